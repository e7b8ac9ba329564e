"""transformers' Trainer with the sequence cut: one changed line in a script that trains with it."""

from typing import Any

import torch
from torch import Tensor

from seqpar.collectives import Group, connect
from seqpar.collectives.group import where
from seqpar.hf.adapt import adapted
from seqpar.hf.fitted import Fitted, run
from seqpar.hf.guard import guard
from seqpar.hf.inputs import Packed, packed
from seqpar.sharding.agreement import check_same, digest
from seqpar.sharding.cut import Cut
from seqpar.sharding.shard import Shard
from seqpar.training.loss import next_token_targets, num_targets


class TrainerMixin:
    """Put before a Trainer's class: ``class Mine(seqpar.hf.TrainerMixin, SFTTrainer)``; ``seqpar.hf.Trainer`` is one.

    Law: P processes train to the numbers of one. All processes share each sequence (``sequence_ranks``: so many that
    follow each other do; the others take other batches), and all of them get its whole batch. Documents begin where
    ``position_ids`` are 0. DistributedDataParallel averages over all processes, which the loss is scaled for; losses
    are logged as those of the whole batch.
    """

    sequence_ranks: int | None = None
    layout: str = "zigzag"
    _fitted: Fitted | None = None
    _group: Group | None = None

    # Where the batches come from.

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Every rank of a sequence takes its batches: processes are counted by sequences."""
        trainer: Any = self
        loader = super()._get_dataloader(*args, **kwargs)  # type: ignore[misc]
        size, world = self.group.size, trainer.args.world_size
        if world > 1:
            dealt = next((d for d in (loader.batch_sampler, loader.dataset) if hasattr(d, "process_index")), None)
            if dealt is None:
                raise ValueError(
                    f"{where(self.group)}: how {type(loader).__name__} deals batches to processes is not known"
                )
            dealt.num_processes, dealt.process_index = world // size, trainer.args.process_index // size
            if world == size:
                dealt.even_batches = False  # as on one process: the last batch is not filled up with the first ones
        return loader

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Tokens with something to predict, of all batches of a step, each sequence counted once."""
        trainer: Any = self
        count = sum(
            num_targets(b.labels, b.lengths) for each in batch_samples if (b := _batch(each)).labels is not None
        )
        total = torch.tensor([count], device=device)
        return trainer.accelerator.gather(total).sum() // self.group.size

    # What is computed of them.

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """My part of the loss, times the number of processes, whose mean is taken; in evaluation the whole loss."""
        trainer: Any = self
        trainer.model_accepts_loss_kwargs = True  # so that it is not divided by the accumulated batches again
        batch = _batch(inputs)
        if batch.labels is None:
            raise ValueError(f"{where(self.group)}: the batch has no labels: use a collator that makes them")
        cut = self._cut(model, batch)
        targets = cut.shard.take(next_token_targets(batch.labels, batch.lengths))
        logits = run(self._model(model), cut.shard.take(batch.tokens), cut, model)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        part = torch.nn.functional.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="sum")
        loss = part / (num_targets(batch.labels, batch.lengths) if num_items_in_batch is None else num_items_in_batch)
        loss = loss * trainer.args.world_size if model.training else self.group.all_reduce(loss.detach()).wait()
        return (loss, {}) if return_outputs else loss

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """The loss of a batch; logits are where their tokens are."""
        trainer: Any = self
        if trainer.compute_metrics is not None:
            raise ValueError(
                f"{where(self.group)}: logits are cut over ranks, so compute_metrics cannot see them: pass none"
            )
        trainer.gather_function = self._of_sequences
        with torch.no_grad():
            return self.compute_loss(model, trainer._prepare_inputs(inputs)).detach(), None, None

    def _of_sequences(self, losses: Tensor) -> Tensor:
        """Those of every sequence once, without what was filled up at the end."""
        accelerator: Any = self.accelerator  # type: ignore[attr-defined]
        each = accelerator.gather(losses).unflatten(0, (accelerator.num_processes, -1))[:: self.group.size].flatten()
        state = accelerator.gradient_state
        return each[: state.remainder] if state.end_of_dataloader and state.remainder > 0 else each

    # Where this process stands.

    @property
    def group(self) -> Group:
        """The processes that share a sequence with this one."""
        if self._group is None:
            everyone = connect()
            size = self.sequence_ranks or everyone.size
            if everyone.size % size:
                raise ValueError(f"{where(everyone)}: sequence_ranks={size} does not divide {everyone.size} processes")
            first = everyone.rank // size * size
            self._group = everyone if size == everyone.size else everyone.subgroup(range(first, first + size))
        return self._group

    def _model(self, model: Any) -> Any:
        trainer: Any = self
        return trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=True)

    def _cut(self, model: Any, batch: Packed) -> Cut:
        """The cut of a batch that is the same on every rank; at the first one the guard looks at the model."""
        group, own = self.group, self._model(model)
        cut = Cut(Shard.of(batch.lengths, group, self.layout), group)
        said = {"the batch's tokens": (digest(batch.tokens), f"shape {list(batch.tokens.shape)}")}
        check_same(said, group, batch.tokens.device)
        if self._fitted is None:
            self._fitted = adapted(own, group)
            guard(own, run, cut, batch.tokens.device)
        self._fitted.check(cut)
        return cut


def _batch(inputs: Any) -> Packed:
    known = ("input_ids", "labels", "attention_mask", "position_ids", "cache", "past_key_values", "inputs_embeds")
    return packed(**{name: inputs[name] for name in known if name in inputs})
