"""A Hugging Face folder as a Megatron checkpoint: python
checkpoints_conversion/hf_to_megatron.py --hf DIR --out DIR [--tp N ...]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from megarl.convert.commands import hf_to_megatron_main  # noqa: E402

if __name__ == "__main__":
    sys.exit(hf_to_megatron_main())
