"""Write a trained detector as TorchScript, ONNX or torch.export file; --help lists the options."""

from ghm_d2.deploy.export_command import main

if __name__ == "__main__":
    main()
