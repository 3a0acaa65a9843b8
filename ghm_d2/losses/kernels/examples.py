"""The examples of several tensors: counted first, weighted once all counts are known."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..density import exact_gradient_density
from ..functional import at_least_float32, count_unit_regions, harmonized_sum, unit_region_index

# A prediction, its target, and the mask of what counts (None: everything).
Arguments = tuple[Tensor, Tensor, Tensor | None]


class Examples(Protocol):
    """What :class:`~ghm_d2.losses.base.HarmonizedLoss` needs of the examples of T tensors."""

    def counts(self, bins: int) -> Tensor:
        """int64 (T, bins): the number of examples of each tensor in each unit region."""

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """`sum_i w_region(i) * loss_i`, a scalar on the graph; `weights` float32 (T, bins).

        :meth:`counts` comes first.
        """


class EagerPart(NamedTuple):
    """The examples of one tensor.

    Attributes:
        loss: loss of each example, any shape, on the graph.
        gradient_norm: of the same shape, in [0, 1].
        valid: bool, broadcastable to it, False drops an example; None keeps all.
        prediction: what they were made from. Overwriting it before the backward pass is an error,
            as it is with the kernels, even where the gradient would not need it.
    """

    loss: Tensor
    gradient_norm: Tensor
    valid: Tensor | None
    prediction: Tensor

    @classmethod
    def empty(cls, prediction: Tensor) -> "EagerPart":
        """No examples: a sum of 0 on `prediction`'s graph, as DDP waits for every parameter."""
        x = at_least_float32(prediction)
        return cls(x, x.detach(), None, prediction)


class EagerExamples:
    """Loss and gradient norm as whole tensors: the readable path, for every device and dtype.

    It is also what torch.compile traces, what second derivatives are taken of, and what the exact
    density needs.
    """

    def __init__(self, parts: Sequence[EagerPart]) -> None:
        self.parts = parts

    def counts(self, bins: int) -> Tensor:
        """See :class:`Examples`."""
        self._regions = [
            unit_region_index(part.gradient_norm, part.valid, bins) for part in self.parts
        ]
        return torch.stack([count_unit_regions(region, bins) for region in self._regions])

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """See :class:`Examples`."""
        terms: list[Tensor] = []
        columns = self.parts, self._regions, weights.unbind()
        for part, region, own in zip(*columns, strict=True):
            if torch.compiler.is_compiling():
                terms.append(harmonized_sum(part.loss, region, own))
            else:
                apply = _HarmonizedSum.apply
                terms.append(apply(part.loss, region, own, part.prediction.detach()))  # type: ignore[no-untyped-call]
        return sum(terms[1:], start=terms[0])

    def exact_sum(self, epsilon: float, pooled: bool) -> Tensor:
        """`sum_i loss_i / GD(g_i)` with the exact density, a scalar on the graph.

        Args:
            epsilon: width of the window.
            pooled: whether all tensors share one density; else each has its own.
        """
        total = torch.zeros((), device=self.parts[0].loss.device)
        for share in [self.parts] if pooled else [[part] for part in self.parts]:
            norms = torch.cat([part.gradient_norm.flatten() for part in share])
            masks = [
                torch.ones_like(part.gradient_norm, dtype=torch.bool)
                if part.valid is None
                else part.valid.expand_as(part.gradient_norm)
                for part in share
            ]
            kept = torch.cat([mask.flatten() for mask in masks])
            losses = torch.cat([part.loss.flatten() for part in share])
            density = exact_gradient_density(norms, epsilon, kept)
            total = total + (losses * torch.where(kept, 1 / density, 0.0)).sum()
        return total


class _HarmonizedSum(torch.autograd.Function):
    """:func:`harmonized_sum` whose backward pass keeps the weights of the forward pass.

    Plain operations would save the weight of each example, and activation checkpointing would
    compute it anew from running counts that have moved on in the meantime.
    """

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, region: Tensor, weights: Tensor, prediction: Tensor
    ) -> Tensor:
        ctx.save_for_backward(region, prediction)
        ctx.weights = F.pad(weights.to(loss.dtype), (0, 1))
        total: Tensor = (loss * ctx.weights[region]).sum()
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        region, _ = ctx.saved_tensors
        return grad_output * ctx.weights[region], None, None, None


class FusedExamples:
    """Examples of a kernel; a subclass computes loss and gradient of `predictions` at once.

    The region weights include the incoming factor when the gradient is written: in half precision,
    small gradients would become 0 before a loss scale could be multiplied in.

    Attributes:
        concludes: whether :meth:`loss` itself checks the values and writes the running counts, as
            :meth:`conclude_with` tells it to.
        others: further tensors that the backward pass reads; overwriting one before it is an error,
            as for a prediction.
    """

    concludes = False
    others: tuple[Tensor, ...] = ()

    def __init__(
        self,
        predictions: Sequence[Tensor],
        eager: Callable[[Sequence[Tensor]], EagerExamples] | None,
    ) -> None:
        """
        Args:
            predictions: T tensors of one dtype and device, contiguous, on the graph.
            eager: makes the same examples of them for the second derivative; None: there is none.
        """
        self.predictions = predictions
        self.data = [x.detach().view(-1) for x in predictions]
        self.eager = eager

    @property
    def differentiate(self) -> bool:
        """Whether a gradient will be asked for."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in self.predictions)

    def conclude_with(
        self, state: dict[str, Tensor], buffers: dict[str, Tensor] | None, failed: Tensor
    ) -> None:
        """See :class:`~ghm_d2.losses.kernels.triton_launch.TritonExamples`."""
        raise NotImplementedError

    def counts(self, bins: int) -> Tensor:
        """See :class:`Examples`."""
        raise NotImplementedError

    def loss(self, weights: Tensor) -> Tensor:
        """The float32 scalar `sum_i w_i loss_i`; `weights` float32 (T, bins)."""
        raise NotImplementedError

    def gradient(self, weights: Tensor, factor: Tensor) -> Sequence[Tensor]:
        """`factor * w_i * d loss_i`, T flat tensors of the predictions' dtype.

        Args:
            weights: float32 (T, bins).
            factor: a scalar.
        """
        raise NotImplementedError

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """See :class:`Examples`."""
        total: Tensor = _FusedSum.apply(  # type: ignore[no-untyped-call]
            self, weights, *self.predictions
        )
        return total


class _FusedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, examples: FusedExamples, weights: Tensor, *predictions: Tensor) -> Tensor:
        ctx.save_for_backward(*predictions, *examples.others)
        ctx.examples, ctx.weights = examples, weights
        return examples.loss(weights)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        examples, weights = ctx.examples, ctx.weights
        # Reading the saved tensors raises an error if one was overwritten since.
        predictions = ctx.saved_tensors[: len(examples.predictions)]
        if not torch.is_grad_enabled():
            gradients = examples.gradient(weights, grad_output)
            pairs = zip(gradients, predictions, strict=True)
            return None, None, *(gradient.view_as(x) for gradient, x in pairs)
        # create_graph=True: this gradient will be differentiated in its turn.
        eager = examples.eager(predictions)
        eager.counts(weights.shape[1])
        wanted = [x for x in predictions if x.requires_grad]
        gradients = iter(
            torch.autograd.grad(eager.weighted_sum(weights), wanted, grad_output, create_graph=True)
        )
        return None, None, *(next(gradients) if x.requires_grad else None for x in predictions)
