"""Write a model repository for NVIDIA Triton Inference Server from an engine.

    python examples/export_for_triton_server.py
    tritonserver --model-repository model_repository      # on a machine that has it

Builds `engine/` in the current folder, unless it is there. The model is one denoising step with dynamic batching; encoding,
the schedule and decoding stay with the client.
"""

from pathlib import Path

from slideredit_rt.engines import read_manifest
from slideredit_rt.export.build import build_engine
from slideredit_rt.export.inference_server import export_triton

ENGINE = Path("engine")
REPOSITORY = Path("model_repository")


def main() -> None:
    """Export, then show what a client has to send."""
    if not ENGINE.exists():
        build_engine("portraits-kontext", "portraits-st", ENGINE)
    # Up to 2 ms of waiting for other requests to join a batch.
    model = export_triton(ENGINE, REPOSITORY, name="slider_backbone", max_queue_delay_us=2000, overwrite=True)
    print(f"{model['model']}: {model['platform']}, batches of up to {model['max_batch_size']}")
    for spec in read_manifest(ENGINE).inputs:
        print(f"  {spec.name:24} {spec.dtype:8} {list(spec.shape)}")


if __name__ == "__main__":
    main()
