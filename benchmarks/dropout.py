"""Dropout against PyTorch's.

python benchmarks/dropout.py --threads 2
python benchmarks/dropout.py --device cuda
"""

import torch
from timing import arguments, by_device, copier, dtypes, median_seconds, print_row
from torch.nn import functional

from transformer_ext.ops import dropout

options = arguments(__doc__)
rng = torch.tensor([1, 2, 3])

shapes = by_device(options, ((256, 512), (4096, 512), (4096, 2048)), ((25000, 512), (50000, 2048)))
for rows, columns in shapes:
    for dtype in dtypes(options):
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
