"""Let vLLM's Model Runner V2 run on a CPU, for tests: `make test-vllm` puts this file into its environment.

Model Runner V2 is what GPUs run. It needs Triton, which has an interpreter; vLLM asks only whether Triton has a
backend for the CPU. A `.pth` file imports this in every process, the engine's too.
"""

import os
import sys
import types

import torchvision_on_cpu  # noqa: F401 - vLLM imports torchvision

os.environ["TRITON_INTERPRET"] = os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"


class _BeforeImport:
    """Acts before vllm is imported, and finds nothing itself."""

    def find_spec(self, name, path=None, target=None):
        if name == "vllm":
            import triton.backends as triton

            driver = types.SimpleNamespace(is_active=lambda: True)
            triton.backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=None)
        return None


sys.meta_path.insert(0, _BeforeImport())
