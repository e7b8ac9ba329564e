"""A Trainer script, as users have them: ``python -m tests.hf.train MODEL_TYPE STEPS [stock]`` prints what it learnt."""

import json
import sys
import tempfile

import torch
import transformers
from transformers import DataCollatorWithFlattening, TrainingArguments

import seqpar.hf
from bench.models.hf.shrink import VOCABULARY, built, shrunk


def main(model_type, steps, stock):
    """Packed batches of short documents, two of them a step."""
    model = built(shrunk(model_type)).float()
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(2, 20, (64,), generator=generator).tolist()
    data = [{"input_ids": torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()} for n in lengths]
    kind = transformers.Trainer if stock else seqpar.hf.Trainer
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=3,
            gradient_accumulation_steps=2,
            learning_rate=1e-3,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        trainer = kind(model, arguments, DataCollatorWithFlattening(), data, data[:10])
        trainer.train()
        evaluated = trainer.evaluate()["eval_loss"]
    if trainer.args.process_index == 0:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        weights = sum(float(each.double().abs().sum()) for each in model.parameters())
        print("learnt", json.dumps({"losses": losses, "evaluated": evaluated, "weights": weights}))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), "stock" in sys.argv)
