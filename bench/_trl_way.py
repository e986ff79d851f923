"""TRL's way to train DPO on the same pairs: its DPOTrainer, with reference log-probs precomputed.

One pair a device batch, padded to the longer of its two rows (more pairs would pad more), and no
gradient checkpointing. Its kernels (Liger) need a GPU, and `padding_free` is switched off in 1.16.
Loading, tokenizing and the reference log-probs are not timed.
"""

import tempfile
from collections.abc import Sequence
from typing import Any

from _clocks import Clock
from _ways import BETA, LR, Setup, Sums
from _workload import counts, text_of
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer

from pipeline.packing import Example


class TrlWay:
    """A DPOTrainer that trains on some of its pairs at a time."""

    def __init__(self, setup: Setup, per_device: int = 1) -> None:
        """Load the model, tokenize the pairs, compute the reference log-probs."""
        from datasets import Dataset, disable_progress_bars

        disable_progress_bars()
        self.hook = StepHook()
        self.trainer = DPOTrainer(
            model=str(setup.folder),
            args=DPOConfig(
                output_dir=tempfile.mkdtemp(prefix="turnwise-bench-"),
                per_device_train_batch_size=per_device,
                gradient_accumulation_steps=setup.batch_size // per_device,
                num_train_epochs=1,
                max_length=None,
                precompute_ref_log_probs=True,
                gradient_checkpointing=False,
                bf16=setup.dtype == "bf16",
                use_cpu=setup.device == "cpu",
                learning_rate=LR,
                beta=BETA,
                train_sampling_strategy="sequential",
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([row_of(pair) for pair in setup.pairs]),
            processing_class=AutoTokenizer.from_pretrained(setup.folder),
            callbacks=[self.hook],
        )
        self.trainer.remove_callback(PrinterCallback)
        self.model = self.trainer.model
        self.dataset = self.trainer.train_dataset
        for pair, row in zip(setup.pairs, self.dataset, strict=True):
            sides = {"chosen": row["chosen_ids"], "reject": row["rejected_ids"]}
            for role, ids in sides.items():
                assert row["prompt_ids"] + ids == pair.strands[role].ids.tolist(), "other ids"

    def train(self, chosen: Sequence[int], clock: Clock) -> None:
        """Take one step."""
        self.trainer.train_dataset = self.dataset.select(chosen)
        self.hook.clock = clock
        self.trainer.train()

    def score(self, chosen: Sequence[int], clock: Clock) -> Sums:
        """Return the reference log-probs that it computed when it was made."""
        names = {"chosen": "ref_chosen_logps", "reject": "ref_rejected_logps"}
        return {(i, role): self.dataset[i][name] for i in chosen for role, name in names.items()}


class StepHook(TrainerCallback):
    """Runs a clock from the beginning of an optimizer step to its end."""

    clock: Clock

    def on_step_begin(self, *args: Any, **others: Any) -> None:
        """Start the clock: the step's batches have been collated before."""
        self.clock.start()

    def on_step_end(self, *args: Any, **others: Any) -> None:
        """Stop the clock."""
        self.clock.stop()


def row_of(pair: Example) -> dict[str, str]:
    """Write a pair as the text that TRL tokenizes."""
    chosen, reject = (strand.ids.tolist() for strand in pair.strands.values())
    prefix, _ = counts(pair)
    texts = {"chosen": chosen[prefix:], "rejected": reject[prefix:]}
    return {"prompt": text_of(chosen[:prefix]) + " "} | {k: text_of(v) for k, v in texts.items()}
