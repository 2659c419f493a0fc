"""Dropout against PyTorch's.

python benchmarks/dropout.py --threads 2
"""

import torch
from timing import arguments, copier, median_seconds, print_row
from torch.nn import functional

from transformer_ext.ops import dropout

options = arguments(__doc__)
rng = torch.tensor([1, 2, 3])

for rows, columns in ((256, 512), (4096, 512), (4096, 2048)):
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(rows, columns).to(dtype)
        size = 2 * x.numel() * x.element_size()
        times = median_seconds(
            {
                "ours": lambda x=x: dropout(x, 0.1, rng, 1),
                "torch": lambda x=x: functional.dropout(x, 0.1),
                "copy": copier(size, dtype),
            },
            options.seconds,
        )
        print_row(f"{rows}x{columns} {str(dtype).removeprefix('torch.')}", times, size)
