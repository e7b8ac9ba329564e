"""A Trainer script, as users have them: ``python -m tests.hf.train 1:JOB 2:JOB ...`` prints what jobs learn on so many
processes.

A job is ``word,word,...``: a ``model_type``, and of ``lora``, ``stock`` (transformers' own Trainer), ``fsdp``,
``pairs`` (two processes share a sequence), ``resume`` (from a checkpoint at half of the steps), ``loop`` (no Trainer,
but accelerate), ``steps=20``, ``accumulate=2``, ``documents=64`` and ``evaluated=10``.
"""

import json
import multiprocessing
import os
import socket
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState
from transformers import DataCollatorWithFlattening, TrainingArguments

import seqpar.hf
from bench.models.hf.shrink import VOCABULARY, built, shrunk

FSDP = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "state_dict_type": "FULL_STATE_DICT"}
LAYERS = {"llama": "LlamaDecoderLayer", "qwen3_next": "Qwen3NextDecoderLayer"}


def model_of(model_type, words):
    """In fp32; with drawn adapters for LoRA, so that all of them have gradients."""
    model = built(shrunk(model_type)).float()
    if "lora" not in words:
        return model
    import peft

    wanted = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, init_lora_weights=False)
    return peft.get_peft_model(model, wanted)


def drawn(documents):
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(2, 20, (documents,), generator=generator).tolist()
    return [{"input_ids": torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()} for n in lengths]


def arguments_of(folder, model_type, words, steps, accumulate):
    fsdp = {"fsdp": True, "fsdp_config": {**FSDP, "transformer_layer_cls_to_wrap": [LAYERS[model_type]]}}
    return TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=accumulate,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="steps" if "resume" in words else "no",
        save_steps=max(1, steps // 2),
        disable_tqdm=True,
        remove_unused_columns=False,
        **(fsdp if "fsdp" in words else {}),
    )


def trained(model_type, words, steps=20, accumulate=2, documents=64, evaluated=10):
    """Packed batches of short documents, several of them a step: losses, in evaluation too, and weights."""
    kind = transformers.Trainer if "stock" in words else seqpar.hf.Trainer
    data = drawn(documents)
    with shared_folder() as folder:

        def made():
            arguments = arguments_of(folder, model_type, words, steps, accumulate)
            trainer = kind(model_of(model_type, words), arguments, DataCollatorWithFlattening(), data, data[:evaluated])
            trainer.sequence_ranks = 2 if "pairs" in words else None
            if "fsdp" in words:
                shard_on_cpu(trainer)
            return trainer

        trainer = made()
        trainer.train()
        if "resume" in words:
            trainer.accelerator.wait_for_everyone()
            trainer = made()
            trainer.train(resume_from_checkpoint=str(Path(folder) / f"checkpoint-{steps // 2}"))
        loss = trainer.evaluate()["eval_loss"]
        trainer.accelerator.wait_for_everyone()
    sharded = any(hasattr(each, "full_tensor") for each in trainer.model.parameters())
    assert sharded == ("fsdp" in words)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "evaluated": loss, "weights": size_of(trainer.model)}


def shard_on_cpu(trainer):
    """accelerate takes FSDP2 for GPUs only, and DDP in silence where there are none: it is told what it would say."""
    state = trainer.accelerator.state
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**trainer.args.fsdp_plugin_args)
    state.distributed_type, trainer.is_fsdp_enabled = DistributedType.FSDP, True


@contextmanager
def shared_folder():
    """The same for all processes of a machine; who made it takes it away."""
    PartialState(cpu=True)
    with tempfile.TemporaryDirectory() as mine:
        names = [mine]
        if torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(names, 0)
        yield names[0]


def size_of(model):
    """The sum of the absolute weights."""
    whole = (each.full_tensor() if hasattr(each, "full_tensor") else each for each in model.parameters())
    return sum(float(each.detach().double().abs().sum()) for each in whole)


def looped(model_type, words, steps=20, accumulate=2, documents=64):
    """accelerate alone: what README and docs say of it."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = model_of(model_type, words)
    optimizer, collate = torch.optim.AdamW(model.parameters(), 1e-3), DataCollatorWithFlattening(return_tensors="pt")
    data = drawn(documents)
    loader = torch.utils.data.DataLoader(data, 3, collate_fn=collate)
    losses = []
    # From here on a script differs.
    model = seqpar.sequence_parallel(model)
    optimizer = accelerator.prepare(optimizer)  # neither the model nor the loader: every process reads all
    for batch, _ in zip(loader, range(steps)):
        with accelerator.accumulate(model):
            loss = model(*seqpar.hf.packed(**batch)).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss))
    return {"losses": losses, "evaluated": 0.0, "weights": size_of(model)}


def work(rank, size, port, jobs):
    """One process of a launcher's."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    if size > 1:
        os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in places.items()}})
    for job in jobs:
        model_type, *words = job.split(",")
        options = {name: int(value) for name, _, value in (word.partition("=") for word in words) if value}
        found = (looped if "loop" in words else trained)(model_type, words, **options)
        state = PartialState(cpu=True)
        if rank == 0:
            print("learnt", json.dumps({"job": f"{size}:{job}", **found}), flush=True)
        state.wait_for_everyone()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def launch(size, jobs):
    """As a launcher does, but for importing: processes are copies of this one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank, size, port, jobs)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            for other in processes:
                other.kill()
            sys.exit(process.exitcode)


if __name__ == "__main__":
    torch.set_num_threads(1)
    wanted = [job.split(":") for job in sys.argv[1:]]
    for processes in sorted({int(size) for size, _ in wanted}):
        launch(processes, [job for size, job in wanted if int(size) == processes])
