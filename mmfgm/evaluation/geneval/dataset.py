# Copyright (c) mmfgm authors.
"""What to generate for GenEval: pairs of a prompt and a sample, from a cache of encoded prompts."""

import hashlib
import json
from collections.abc import Sequence

import torch

from mmfgm.datasets import Batch, CachedPrompts, item_seed
from mmfgm.errors import UsageError
from mmfgm.registry import DATASETS

from .judging.prompts import generate, read_metadata


def metadata_rows(metadata: str | None) -> list[dict]:
    """Rows of a prompt file, or GenEval's 553 prompts without one."""
    return read_metadata(metadata) if metadata else generate()


@DATASETS.register_module()
class GenEvalPrompts(CachedPrompts):
    """Items ``dict(idx, seed, cond=dict(prompt_embeds, pooled_embeds))``; item ``idx`` is sample
    ``idx % n`` of prompt ``idx // n``.

    Write the prompts with ``tools/geneval.py prompts``, and encode them with
    ``tools/cache_prompts.py``.

    Args:
        path (str): The cache's folder.
        metadata (str, optional): Prompt file, see :func:`~mmfgm.evaluation.geneval.read_metadata`.
            Defaults to the 553 prompts of the paper.
        samples_per_prompt (int): ``n``. Defaults to 4.
        seed (int): Selects other noise. Defaults to 0.
        **kwargs: For :class:`~mmfgm.datasets.CachedPrompts`.

    Raises:
        UsageError: If the cache holds other prompts; otherwise as
            :class:`~mmfgm.datasets.CachedPrompts`.
    """

    def __init__(
        self,
        path: str,
        metadata: str | None = None,
        samples_per_prompt: int = 4,
        seed: int = 0,
        **kwargs,
    ):
        if samples_per_prompt < 1:
            raise UsageError(f'samples_per_prompt must be at least 1, but is {samples_per_prompt}')
        self.rows = metadata_rows(metadata)
        self.samples_per_prompt = samples_per_prompt
        self.seed = seed
        super().__init__(path, **kwargs)
        prompts = [json.dumps(row['prompt']) for row in self.rows]
        source = self.manifest['source']
        if source['sha256'] != hashlib.sha256('\n'.join(prompts).encode()).hexdigest():
            raise UsageError(
                f'{self.path!r} holds {source["count"]} other prompts than'
                f' {metadata or "those of GenEval"} ({len(prompts)}): write them with python'
                ' tools/geneval.py prompts FILE.jsonl, and encode FILE.jsonl with'
                ' tools/cache_prompts.py'
            )
        self.identity = dict(shards=[shard['sha256'] for shard in self.shards])

    def __len__(self) -> int:
        return len(self.rows) * self.samples_per_prompt

    def row(self, index: int) -> dict:
        """Metadata row of an item, which batches leave out because networks cannot use it."""
        return self.rows[index // self.samples_per_prompt]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        idx = torch.as_tensor(indices)
        # larger indices are padding
        places = [
            self._locate(index // self.samples_per_prompt % len(self.rows))
            for index in idx.tolist()
        ]
        return dict(
            idx=idx,
            seed=item_seed(idx, self.seed),
            cond=self._prompts(places),
        )
