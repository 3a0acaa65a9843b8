"""Checks of values where the host must not wait: kept on the device, raised later."""

import pytest
import torch

from ghm_d2.losses import GHMCLoss
from ghm_d2.losses.base import raise_deferred_errors
from ghm_d2.losses.checks import ValueChecks, raise_first


@pytest.fixture
def deferred(monkeypatch):
    """Lets the CPU pass for a device that the host should not wait for."""

    def require(self, condition, message):
        self._kept.append((condition, message))

    monkeypatch.setattr(ValueChecks, "require", require)


def call(module, bad=False):
    labels = torch.tensor([0, 1, 2, 2])
    if bad:
        labels[3] = 9
    logits = torch.linspace(-2, 2, 8).view(4, 2).requires_grad_()
    return module(logits, labels)


def test_deferred_misuse_gives_nan_now_and_the_reason_later(deferred):
    module = GHMCLoss()
    assert call(module).isfinite()
    before = module.acc_sum.clone()
    assert call(module, bad=True).isnan()
    assert torch.equal(module.acc_sum, before)
    assert call(module).isfinite()  # one bad call does not spoil the next
    with pytest.raises(ValueError, match="labels must lie in"):
        raise_deferred_errors(torch.nn.Sequential(module))
    raise_deferred_errors(module)  # raised once


def test_flags_are_folded_not_collected(deferred):
    module = GHMCLoss()
    call(module)
    kept = len(module._failures)
    for _ in range(5):
        call(module)
    assert len(module._failures) == kept > 0
    raise_deferred_errors(module)


def test_raise_first_names_the_first_that_applies():
    failures = {"a": torch.tensor(False), "b": torch.tensor(True), "c": torch.tensor(True)}
    with pytest.raises(ValueError, match="^b$"):
        raise_first(failures)
    assert not failures


def test_compiled_misuse_gives_nan_and_writes_nothing():
    module = GHMCLoss()
    compiled = torch.compile(module, backend="eager")
    torch.testing.assert_close(call(compiled), call(GHMCLoss()))
    before = module.acc_sum.clone()
    assert call(compiled, bad=True).isnan()
    assert torch.equal(module.acc_sum, before)
    assert not module._failures


def test_conditions_without_a_value_are_forgotten():
    checks, failures = ValueChecks(), {}
    checks.require(torch.ones((), dtype=torch.bool, device="meta"), "there is no value")
    checks.defer_to(failures)
    assert checks.all_hold() is None and not failures


def test_conditions_on_a_device_are_kept_and_joined(monkeypatch):
    monkeypatch.setattr("ghm_d2.losses.checks.is_plain", lambda value: True)  # meta stands for it
    checks = ValueChecks()
    assert checks.all_hold() is None
    on_device = torch.ones((), dtype=torch.bool, device="meta")
    checks.require(on_device, "not asked for its value")
    assert checks.all_hold() is on_device
    failures = {}
    checks.defer_to(failures)
    assert list(failures) == ["not asked for its value"]


def test_while_compiling_conditions_are_joined_and_no_tensor_is_kept(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    checks, failures = ValueChecks(), {}
    checks.require(torch.tensor(True), "a")
    assert checks.all_hold().item() is True
    checks.require(torch.tensor(False), "b")
    checks.require(torch.tensor(True), "c")
    assert checks.all_hold().item() is False
    checks.defer_to(failures)
    assert not failures


def test_a_failure_stays_until_it_is_raised(deferred):
    failures = {}
    for holds in (True, False, True):
        checks = ValueChecks()
        checks.require(torch.tensor(holds), "a")
        checks.defer_to(failures)
    assert failures["a"].item() is True
    with pytest.raises(ValueError, match="^a$"):
        raise_first(failures)
    raise_first(failures)


def test_failures_that_do_not_apply_are_forgotten():
    failures = {"a": torch.tensor(False)}
    raise_first(failures)
    assert not failures
