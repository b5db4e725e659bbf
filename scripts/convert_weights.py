"""Writes a backbone's weights in another format.

python scripts/convert_weights.py vits14_reg --weights dinov2_vits14_reg4_pretrain.pth --to huggingface --output folder
"""

import argparse
import sys
from collections.abc import Sequence

from dense_heads.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the weights (any format, told by their keys), checks them, writes them. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", help="name, e.g. vitb14_reg")
    parser.add_argument("--weights", default="official", help="official, in-house, hf:OWNER/REPOSITORY, file or folder")
    parser.add_argument("--to", required=True, help="official (.pth), huggingface (folder), timm, own (safetensors)")
    parser.add_argument("--output", required=True, help="file to write; for huggingface the folder")
    parser.add_argument("--bfloat16", action="store_true", help="round to half the size")
    arguments = parser.parse_args(argv)

    # torch is loaded only now: --help answers at once
    import torch

    from dense_heads.backbones.weights import load_backbone, save_backbone

    try:
        backbone = load_backbone(arguments.backbone, weights=arguments.weights)
        dtype = torch.bfloat16 if arguments.bfloat16 else torch.float32
        written = save_backbone(backbone, arguments.output, arguments.to, dtype)
        fingerprint = load_backbone(arguments.backbone, weights=written).fingerprint()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{written} ({backbone.name}, fingerprint {fingerprint})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
