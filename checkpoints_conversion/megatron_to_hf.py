"""A Megatron checkpoint as a Hugging Face folder: python
checkpoints_conversion/megatron_to_hf.py --megatron DIR --out DIR
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from megarl.convert.commands import megatron_to_hf_main  # noqa: E402

if __name__ == "__main__":
    sys.exit(megatron_to_hf_main())
