"""Let vLLM's Model Runner V2 run on a CPU, for tests: `make test-vllm` puts this file into its environment.

Model Runner V2 is what GPUs run. It needs Triton, which has an interpreter; vLLM asks only whether Triton has a
backend for the CPU. PyPI's torchvision cannot load its C++ beside a CPU build of torch: its operators are declared, so
that its transforms, which are Python, import. A `.pth` file imports this in every process, the engine's too.
"""

import os
import sys
import types

OPERATORS = (
    *("nms", "qnms", "roi_align", "_roi_align_backward", "roi_pool", "_roi_pool_backward", "ps_roi_align"),
    *("_ps_roi_align_backward", "ps_roi_pool", "_ps_roi_pool_backward", "deform_conv2d"),
    "_deform_conv2d_backward",
)
os.environ["TRITON_INTERPRET"] = os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"


class _BeforeImport:
    """Acts before vllm and before torchvision are imported, and finds nothing itself."""

    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "vllm":
            import triton.backends as triton

            driver = types.SimpleNamespace(is_active=lambda: True)
            triton.backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=None)
        if name == "torchvision" and _BeforeImport.library is None:
            import torch

            _BeforeImport.library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in OPERATORS:
                _BeforeImport.library.define(f"{operator}(Tensor x) -> Tensor")
        return None


sys.meta_path.insert(0, _BeforeImport())
