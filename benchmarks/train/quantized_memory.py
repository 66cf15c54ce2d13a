"""What a model takes in each format of packed bits: loaded, and in a training step.

    python -m benchmarks.train.quantized_memory --out benchmarks/results/quantized_memory
    python -m benchmarks.train.quantized_memory --model llama-1.1b --formats bfloat16,nf4,peft-nf4

Every contender runs in a process of its own, from the import of its libraries on: it loads the
model in bfloat16, puts LoRA of rank 16 on every linear, accelerates it and makes one step. `kept`
is the GGUF file's own blocks; `peft-nf4` is transformers with bitsandbytes' Linear4bit and PEFT
alone. `llama-1.1b` is random, of TinyLlama's sizes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import measure, output

MODELS = ("smollm2", "llama-1.1b")
FORMATS = "bfloat16,nf4,nf4-double,int8,fp8_block,mxfp4,nvfp4,int4,q4_0,kept,peft-nf4"
TOKENS = 512


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help=f"one of {', '.join(MODELS)}, a folder")
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of the step's batch")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a contender
    return parser.parse_args(argv)


def write_random_llama(folder: Path) -> None:
    """A model of 1.1 billion random parameters and a tokenizer that nobody asks."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lora_engine.testing import byte_tokenizer

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    byte_tokenizer().save_pretrained(folder)


def load(source: str, contender: str) -> Any:
    import torch

    import lora_engine

    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cpu"}
    if contender == "peft-nf4":
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        how = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        return AutoModelForCausalLM.from_pretrained(
            source, quantization_config=how, dtype=torch.bfloat16, device_map="cpu"
        )
    if contender == "kept":
        options["keep_quantized"] = True
    elif contender != "bfloat16":
        options["quantize"] = contender.removesuffix("-double")
        options["double_quant"] = contender.endswith("-double")
    return lora_engine.load_model(source, **options)[0]


def weight_bytes(model: Any) -> int:
    """Of all parameters, scales included, each storage once."""
    from lora_engine.models.quantized.linear import QuantizedLinear

    tensors = list(model.parameters())
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            tensors += module.quantized.tensors.values()
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            tensors.append(state.absmax)
    return sum({x.untyped_storage().data_ptr(): x.nbytes for x in tensors}.values())


def run_one(args: argparse.Namespace) -> dict[str, Any]:
    """One contender's bytes and seconds."""
    import accelerate  # noqa: F401
    import peft
    import torch

    import lora_engine

    if args.one == "peft-nf4":
        import bitsandbytes  # noqa: F401
    torch.manual_seed(0)
    before = measure.resident_bytes()
    started = time.perf_counter()
    model = load(args.model, args.one)
    seconds = time.perf_counter() - started
    measure.release_free_memory()
    result = {
        "weights": weight_bytes(model),
        "load_peak": measure.peak_resident_bytes() - before,
        "loaded": measure.resident_bytes() - before,
        "load_seconds": seconds,
    }
    config = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config).train()
    if args.one != "peft-nf4":
        lora_engine.accelerate(model)
    ids = torch.randint(0, 256, (1, args.tokens))
    measure.release_free_memory()
    measure.reset_peak()
    started = time.perf_counter()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    result["step_seconds"] = time.perf_counter() - started
    result["step_peak"] = measure.peak_resident_bytes() - before
    result["loss"] = loss.item()
    return result


def source_of(name: str, contender: str, folder: Path) -> str:
    """What `contender` loads: transformers reads no GGUF of its own accord."""
    import torch

    from lora_engine.models.load.gguf import converted_gguf, smollm2_gguf_path

    if name == "llama-1.1b":
        if not folder.is_dir():
            write_random_llama(folder)
        return str(folder)
    if name == "smollm2" and contender == "peft-nf4":
        return str(converted_gguf(smollm2_gguf_path(), torch.bfloat16))
    return name


def table(rows: dict[str, dict[str, Any]]) -> str:
    columns = ("format", "weights MB", "load peak MB", "step peak MB", "load s", "step s", "loss")
    return output.table(
        columns,
        [
            [
                name,
                *(f"{row[key] / 1e6:,.0f}" for key in ("weights", "load_peak", "step_peak")),
                f"{row['load_seconds']:.1f}",
                f"{row['step_seconds']:.1f}",
                f"{row['loss']:.3f}",
            ]
            for name, row in rows.items()
        ],
    )


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.one:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        print(json.dumps(run_one(args)))
        return
    context = output.context()
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for contender in args.formats.split(","):
            source = source_of(args.model, contender, Path(temporary) / "model")
            command = [sys.executable, "-m", "benchmarks.train.quantized_memory"]
            command += ["--one", contender, "--model", source, "--tokens", str(args.tokens)]
            root = Path(__file__).parents[2]
            run = subprocess.run(command, capture_output=True, text=True, cwd=root)
            if run.returncode:
                raise SystemExit(f"{contender}: {run.stderr.strip().splitlines()[-1]}")
            rows[contender] = json.loads(run.stdout.splitlines()[-1])
            print(contender, rows[contender], file=sys.stderr, flush=True)
    text = f"{args.model}, LoRA of rank 16, {args.tokens} tokens, bfloat16\n\n{table(rows)}\n\n"
    text += "Peaks are above what the process held once its libraries were imported.\n\n"
    text += output.header(context)
    print(text)
    if args.out:
        output.write(args.out, {"context": context, "model": args.model, "rows": rows}, text)


if __name__ == "__main__":
    main()
