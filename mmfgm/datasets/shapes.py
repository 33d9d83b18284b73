# Copyright (c) mmfgm authors.
"""Captioned shapes: a text-to-image problem without files, in GenEval's six task kinds (Ghosh et
al., 2023).

A scene is one to four shapes of clear colours on black, its row says what the caption promises, and
a fixed vector for each word is the text encoder. Images are exact enough for an exact detector, see
:mod:`mmfgm.evaluation.shapes`. Mirroring would turn "left of" into a wrong caption: train with
``flip_prob=0``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmfgm.errors import UsageError
from mmfgm.registry import DATASETS, TASK_UTILS

from .base import Batch, BatchDataset, item_seed

TAGS = ('single_object', 'two_object', 'counting', 'colors', 'position', 'color_attr')
# a seventh kind for training alone, "a red circle left of a blue square": what people type, and no
# score of GenEval's
KINDS = (*TAGS, 'color_position')
PLURALS = dict(circle='circles', square='squares', triangle='triangles', cross='crosses')
SHAPES = tuple(PLURALS)
# corners of the RGB cube: a blend of one with black lies closer to it or to black than to any other
COLORS = dict(
    red=(255, 0, 0),
    green=(0, 255, 0),
    blue=(0, 0, 255),
    yellow=(255, 255, 0),
    purple=(255, 0, 255),
    white=(255, 255, 255),
)
COUNTS = {2: 'two', 3: 'three', 4: 'four'}
# axis and sign of (x, y of the first) - (x, y of the second); y points down
RELATIONS = {'left of': (0, -1), 'right of': (0, 1), 'above': (1, -1), 'below': (1, 1)}
VOCABULARY = (
    'a',
    'and',
    'of',
    'left',
    'right',
    'above',
    'below',
    *COUNTS.values(),
    *SHAPES,
    *PLURALS.values(),
    *COLORS,
)

# fractions of the canvas: radii of one to four objects, free space between two boxes, and at the
# border
RADII = ((0.15, 0.25), (0.14, 0.2), (0.13, 0.17), (0.13, 0.15))
GAP = 2 / 32
BORDER = 1 / 32


class Item(NamedTuple):
    """A shape in a scene; ``x, y`` and the half side ``r`` of its square box are fractions of the
    canvas."""

    shape: str
    color: str
    x: float
    y: float
    r: float


Scene = tuple[dict, list[Item]]


@dataclass(frozen=True)
class World:
    """What scenes are made of; fewer kinds and larger shapes are an easier problem.

    Args:
        shapes (Sequence[str]): At least two of ``SHAPES``. Defaults to all.
        colors (Sequence[str]): At least two of ``COLORS``. Defaults to all.
        radii (Sequence[tuple[float, float]]): The range of half the side of one object, of each of
            two, three and four, in fractions of the canvas. Defaults to ``RADII``.

    Raises:
        UsageError: If there are too few, or they do not fit on the canvas.
    """

    shapes: Sequence[str] = SHAPES
    colors: Sequence[str] = tuple(COLORS)
    radii: Sequence[Sequence[float]] = RADII

    def __post_init__(self):
        for name, known in (('shapes', SHAPES), ('colors', tuple(COLORS))):
            chosen = getattr(self, name)
            if len(set(chosen)) < 2 or set(chosen) - set(known):
                raise UsageError(
                    f'expected at least two {name} of {list(known)}, found {list(chosen)}; name'
                    ' those to draw'
                )
        if len(self.radii) != len(RADII):
            raise UsageError(
                f'expected radii of one to {len(RADII)} objects, found {len(self.radii)} of them;'
                f' give as many ranges, as {RADII}'
            )
        for n, (low, high) in enumerate(self.radii, 1):
            rows = min(n, 2)  # of two boxes at most
            largest = (1 - 2 * BORDER - (rows - 1) * GAP) / (2 * rows)
            if not 0 < low <= high <= largest:
                raise UsageError(
                    f'expected radii of {n} objects that fit beside each other, found'
                    f' {(low, high)}; give 0 < low <= high <= {largest}'
                )


def _place(
    rng: np.random.Generator, n: int, relation: str | None, radii: Sequence[float]
) -> np.ndarray:
    """``(n, 3)`` of x, y, r: disjoint boxes; of two, the first stands in ``relation`` to the
    second."""
    tries = (1, 8, 32, 128)[n - 1]  # drawn at once, about as many as it takes
    i, j = np.triu_indices(n, 1)
    while True:
        r = rng.uniform(*radii, (tries, n, 1))
        centre = BORDER + r + rng.random((tries, n, 2)) * (1 - 2 * (BORDER + r))
        apart = np.abs(centre[:, i] - centre[:, j]).max(-1) >= (r[:, i] + r[:, j])[..., 0] + GAP
        good = apart.all(-1)
        if relation:
            axis, sign = RELATIONS[relation]
            offset = centre[:, 0] - centre[:, 1]
            # GenEval asks for cos > 0.5 after shrinking the offset by a fifth of the boxes; this is
            # cos > 0.7
            good &= sign * offset[:, axis] >= 2 * np.abs(offset[:, 1 - axis])
        found = np.flatnonzero(good)
        if len(found):
            return np.concatenate([centre[found[0]], r[found[0]]], -1)


def sample_scene(rng: np.random.Generator, tag: str, world: World | None = None) -> Scene:
    """Draw a caption of one task kind and a scene that shows it, with nothing else in it; by
    default of all shapes and colours.

    Returns:
        tuple[dict, list[Item]]: GenEval's metadata row, ``dict(tag, include, [exclude], prompt)``,
        and the objects.

    Raises:
        UsageError: If there is no such task.
    """
    if tag not in KINDS:
        raise UsageError(f'there is no task {tag!r}; choose from {list(KINDS)}')
    world = world or World()
    kinds, palette = world.shapes, world.colors
    a, b = (kinds[i] for i in rng.permutation(len(kinds))[:2])
    colors = [palette[i] for i in rng.integers(len(palette), size=max(COUNTS))]
    count = 1
    relation = None
    if tag == 'counting':
        count = int(rng.integers(min(COUNTS), max(COUNTS) + 1))
    elif tag.endswith('position'):
        relation = list(RELATIONS)[rng.integers(len(RELATIONS))]
    if tag in ('color_attr', 'color_position'):
        colors = [palette[i] for i in rng.permutation(len(palette))[:2]]
    first = {'class': a, 'count': count}
    second = {'class': b, 'count': 1}
    row: dict[str, Any] = dict(tag=tag, include=[first])
    if 'color' in tag:
        first['color'] = colors[0]
    if tag in ('color_attr', 'color_position'):
        second['color'] = colors[1]
    if tag in ('two_object', 'color_attr'):
        row['include'].append(second)
    elif relation:
        # the target comes first, and the other clause names it by its place in the list
        first['position'] = [relation, 0]
        row['include'].insert(0, second)
    elif tag == 'counting':
        row['exclude'] = [{'class': a, 'count': count + 1}]
    row['prompt'] = _caption(first, second if len(row['include']) == 2 else None)
    shapes = [a] * count if len(row['include']) == 1 else [a, b]
    places = _place(rng, len(shapes), relation, world.radii[len(shapes) - 1])
    return row, [
        Item(shape, color, *place) for shape, color, place in zip(shapes, colors, places.tolist())
    ]


def _caption(first: dict, second: dict | None) -> str:
    if first['count'] > 1:
        return f'{COUNTS[first["count"]]} {PLURALS[first["class"]]}'
    phrases = [
        ' '.join(['a', *([c['color']] if 'color' in c else []), c['class']])
        for c in (first, second)
        if c
    ]
    return f' {first["position"][0] if "position" in first else "and"} '.join(phrases)


def coverage(shape: str, x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    """How much of the pixel at ``(x, y)`` from the centre of a shape it covers, in [0, 1].

    Args:
        shape (str): One of ``SHAPES``.
        x (np.ndarray): Pixels to the right; broadcast.
        y (np.ndarray): Pixels downwards; broadcast.
        r (np.ndarray): Half side of the shape's box, in pixels.
    """
    dx = np.abs(x)
    dy = np.abs(y)
    arm = r / 3
    # distance to the edge, positive inside
    inside = dict(
        circle=lambda: r - np.hypot(x, y),
        square=lambda: r - np.maximum(dx, dy),
        triangle=lambda: np.minimum(r - y, ((r + y) / 2 - dx) / np.sqrt(1.25)),
        cross=lambda: np.maximum(np.minimum(arm - dx, r - dy), np.minimum(arm - dy, r - dx)),
    )[shape]()
    return np.clip(inside + 0.5, 0, 1)


def render(scenes: Sequence[Sequence[Item]], size: int) -> Tensor:
    """Images ``(N, 3, size, size)`` uint8 of scenes, with edges one pixel wide."""
    flat = [(n, item) for n, items in enumerate(scenes) for item in items]
    images = np.zeros((len(scenes), 3, size, size), np.uint8)
    grid = np.arange(size) + 0.5
    for shape in SHAPES:
        chosen = [(n, item) for n, item in flat if item.shape == shape]
        x, y, r = (
            size * np.array([item[field] for _, item in chosen])[:, None, None]
            for field in (2, 3, 4)
        )
        alpha = coverage(shape, grid - x, grid[:, None] - y, r)
        for (n, item), a in zip(chosen, alpha):
            # boxes do not overlap, so neither order nor blending matters
            images[n] += np.rint(a * np.array(COLORS[item.color])[:, None, None]).astype(np.uint8)
    return torch.from_numpy(images)


@TASK_UTILS.register_module()
class WordEncoder:
    """A text encoder with one fixed random vector of unit variance for each word and each position.

    Args:
        dim (int): Width of ``prompt_embeds``. Defaults to 64.
        pooled_dim (int): Width of ``pooled_embeds``. Defaults to 64.
        max_words (int): Length of ``prompt_embeds``; shorter prompts are padded with zeros.
            Defaults to 12.
        seed (int): Selects other vectors. Defaults to 0.
    """

    def __init__(self, dim: int = 64, pooled_dim: int = 64, max_words: int = 12, seed: int = 0):
        rng = np.random.default_rng(seed)

        def table(*shape: int) -> np.ndarray:
            return rng.uniform(
                -np.sqrt(3), np.sqrt(3), shape
            )  # variance 1, the same bits on every machine

        self.max_words = max_words
        self.index = {word: i for i, word in enumerate(VOCABULARY)}
        self.words = table(len(VOCABULARY), dim)
        self.positions = table(max_words, dim)
        self.pooled_words = table(len(VOCABULARY), pooled_dim)
        self.pooled_positions = table(max_words, pooled_dim)

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """``prompt_embeds (N, max_words, dim)`` and ``pooled_embeds (N, pooled_dim)``, float32;
        zeros for ``''``.

        Raises:
            UsageError: If a prompt is too long or has an unknown word.
        """
        ids = np.full((len(prompts), self.max_words), -1)
        for row, prompt in zip(ids, prompts):
            words = prompt.split()
            if len(words) > self.max_words:
                raise UsageError(
                    f'the prompt {prompt!r} has {len(words)} words, but max_words={self.max_words};'
                    ' raise it'
                )
            for place, word in enumerate(words):
                if word not in self.index:
                    raise UsageError(
                        f'the word {word!r} of the prompt {prompt!r} is unknown; use'
                        f' {", ".join(VOCABULARY)}'
                    )
                row[place] = self.index[word]
        real = (ids >= 0)[..., None]
        embeds = real * (self.words[ids] + self.positions) / np.sqrt(2)
        # each word times its place's vector, so that the sum knows the order
        pooled = (real * self.pooled_words[ids] * self.pooled_positions).sum(1)
        # unit variance for one word or seven; float64's smallest number keeps the empty prompt at
        # zero
        pooled /= np.sqrt((pooled**2).mean(-1, keepdims=True)) + np.finfo(float).tiny
        return dict(
            prompt_embeds=torch.from_numpy(embeds).float(),
            pooled_embeds=torch.from_numpy(pooled).float(),
        )

    def check(self, prompts: Sequence[str]) -> None:
        """Raise the UsageError that :meth:`encode` would."""
        self.encode(prompts)


@TASK_UTILS.register_module()
@dataclass(frozen=True)
class ZeroPrompt:
    """The condition that means "no prompt": all embeddings zero, to which :class:`WordEncoder` maps
    the empty prompt."""

    def __call__(self, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            **cond,
            **{name: torch.zeros_like(cond[name]) for name in ('prompt_embeds', 'pooled_embeds')},
        }


@DATASETS.register_module()
class Shapes(BatchDataset):
    """Captioned shapes: items ``dict(idx, [x_0], cond=dict(prompt_embeds, pooled_embeds))``,
    functions of (seed, idx) alone.

    ``x_0 (3, size, size)`` is uint8; the embeddings are those of :class:`WordEncoder`. Item ``idx``
    has task ``tags[idx % len(tags)]``.

    Args:
        size (int): Height and width in pixels. Defaults to 32; below 24 the detector makes
            mistakes.
        length (int): Number of items. Defaults to 50,000.
        seed (int): Selects other scenes. Defaults to 0.
        tags (Sequence[str]): Task kinds, of ``KINDS``. Defaults to GenEval's six.
        encoder (dict): Arguments of :class:`WordEncoder`.
        images (bool): False for FGM, which needs no data: items without ``x_0``.
        world (dict): Arguments of :class:`World`.

    Raises:
        UsageError: If there is no such task, nothing to do, or no such world.
    """

    def __init__(
        self,
        size: int = 32,
        length: int = 50000,
        seed: int = 0,
        tags: Sequence[str] = TAGS,
        encoder: dict | None = None,
        images: bool = True,
        world: dict | None = None,
    ):
        super().__init__()
        if length < 1 or not tags or set(tags) - set(KINDS):
            raise UsageError(
                f'expected at least 1 item and tasks from {list(KINDS)}, but got {length} items'
                f' and tags={list(tags)}'
            )
        self.length = length
        self.seed = seed
        self.tags = tuple(tags)
        self.images = images
        self.event_shape = (3, size, size)
        self.encoder = WordEncoder(**(encoder or {}))
        self.world = World(**(world or {}))

    def __len__(self) -> int:
        return self.length

    def scene(self, index: int) -> Scene:
        """Metadata row and objects of an item; see :func:`sample_scene`."""
        return sample_scene(
            np.random.default_rng([self.seed, index]),
            self.tags[index % len(self.tags)],
            self.world,
        )

    def row(self, index: int) -> dict:
        """Metadata row of an item, which batches leave out because networks cannot use it."""
        return self.scene(index)[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        idx = torch.as_tensor(indices)
        rows, items = zip(*map(self.scene, idx.tolist()))
        images = dict(x_0=render(items, self.event_shape[-1])) if self.images else {}
        return dict(idx=idx, **images, cond=self.encoder.encode([row['prompt'] for row in rows]))

    def caption(self, index: int) -> str:
        return self.row(index)['prompt']


@DATASETS.register_module()
class ShapePrompts(Shapes):
    """What to generate in an evaluation: items ``dict(idx, seed, cond=dict(prompt_embeds,
    pooled_embeds))``, tasks in equal parts.

    The captions are those of :class:`Shapes` with the same seed, tags, encoder and world.

    Args:
        num_samples (int): Number of items; larger indices are padding.
        seed (int): Selects other captions and noise. Defaults to 1, which is not the seed of the
            training data.
        tags (Sequence[str]): Task kinds, of ``KINDS``. Defaults to GenEval's six.
        encoder (dict): Arguments of :class:`WordEncoder`.
        world (dict): Arguments of :class:`World`.
    """

    def __init__(
        self,
        num_samples: int,
        seed: int = 1,
        tags: Sequence[str] = TAGS,
        encoder: dict | None = None,
        world: dict | None = None,
    ):
        super().__init__(
            length=num_samples, seed=seed, tags=tags, encoder=encoder, images=False, world=world
        )

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        batch = super().__getitems__(indices)
        return dict(batch, seed=item_seed(batch['idx'], self.seed))
