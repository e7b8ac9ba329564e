"""Fine-tune a model of transformers on a folder of text, its sequences cut over all processes.

    torchrun --standalone --nproc-per-node 2 examples/finetune.py --model PATH --text FOLDER --lora 8

Documents are packed one after the other into sequences of --tokens; none of them sees another, and the numbers are
those of one process. Without a tokenizer beside the model, bytes are the tokens.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithFlattening, TrainingArguments

import seqpar.hf


def main() -> None:
    """Read, pack, train, save."""
    options = _options()
    model: Any = AutoModelForCausalLM.from_pretrained(options.model)
    if options.lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=options.lora, target_modules="all-linear", lora_dropout=0.0))
    documents = [{"input_ids": tokens} for tokens in read(options.model, Path(options.text), options.tokens)]
    arguments = TrainingArguments(
        options.out,
        max_steps=options.steps,
        per_device_train_batch_size=options.documents,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.rate,
        gradient_checkpointing=options.checkpoint,
        logging_steps=1,
        report_to=[],
        remove_unused_columns=False,
        use_cpu=options.cpu,
    )
    trainer = seqpar.hf.Trainer(model, arguments, DataCollatorWithFlattening(), documents)
    trainer.train()
    trainer.save_model(options.out)
    trainer.accelerator.wait_for_everyone()  # who ends first would take the others' connections along
    trainer.accelerator.end_training()


def read(model: str, folder: Path, most: int) -> Iterator[list[int]]:
    """The tokens of every file, in documents of at most ``most``."""
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError):
        tokenizer = None
    for file in sorted(folder.rglob("*.txt")):
        text = file.read_text(errors="replace")
        tokens = list(text.encode()) if tokenizer is None else tokenizer(text)["input_ids"]
        yield from (part for start in range(0, len(tokens), most) if len(part := tokens[start : start + most]) > 1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder with a model of transformers, or its name")
    parser.add_argument("--text", required=True, help="a folder with .txt files")
    parser.add_argument("--out", default="finetuned", help="where the model goes")
    parser.add_argument("--tokens", type=int, default=4096, help="of a document, at most")
    parser.add_argument("--documents", type=int, default=4, help="packed into one sequence")
    parser.add_argument("--accumulate", type=int, default=1, help="sequences of a step")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rate", type=float, default=1e-4, help="learning rate")
    parser.add_argument(
        "--lora", type=int, default=0, metavar="RANK", help="train adapters of this rank (0: all weights)"
    )
    parser.add_argument("--checkpoint", action="store_true", help="compute layers again in backward")
    parser.add_argument("--cpu", action="store_true", help="use no GPU")
    return parser.parse_args()


if __name__ == "__main__":
    main()
