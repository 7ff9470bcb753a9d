"""Let PyPI's torchvision be imported beside a CPU build of torch, for tests.

It is built for CUDA, so its C++ does not load there. Its operators are declared instead, and its transforms, which are
Python and all that processors use, import. A `.pth` file imports this in every process of an environment for tests.
"""

import sys

OPERATORS = (
    *("nms", "qnms", "roi_align", "_roi_align_backward", "roi_pool", "_roi_pool_backward", "ps_roi_align"),
    *("_ps_roi_align_backward", "ps_roi_pool", "_ps_roi_pool_backward", "deform_conv2d"),
    "_deform_conv2d_backward",
)


class _BeforeImport:
    """Acts before torchvision is imported, and finds nothing itself."""

    library = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and _BeforeImport.library is None:
            import torch

            _BeforeImport.library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in OPERATORS:
                _BeforeImport.library.define(f"{operator}(Tensor x) -> Tensor")
        return None


sys.meta_path.insert(0, _BeforeImport())
