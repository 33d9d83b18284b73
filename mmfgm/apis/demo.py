# Copyright (c) mmfgm authors.
"""A page to try a generator in the browser: prompt or class, seed, one-step picture, the teacher's
beside it."""

import functools
import os
import secrets
import tempfile
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any

from PIL import Image

from mmfgm.errors import NonFiniteError, UsageError
from mmfgm.files import read_text

from .artifacts import is_export
from .config import read_config, weights_of
from .inferencer import FGMInferencer

SHOWN_SIZE = 320  # pixels; smaller pictures are enlarged by a whole factor
QUEUE = 32  # visitors who wait for a picture; the next one is told to come back
KEPT = 3600  # seconds until a picture is removed from the disk
# The page takes no files, but gradio's server would take any that is sent to it.
UPLOAD_LIMIT = 1 << 10  # bytes
AUTH_VARIABLE = 'MMFGM_DEMO_AUTH'
# what the page shows before anybody has typed
FIRST_PROMPT = 'a red circle left of a blue square'
WHOLE_NUMBER = 'fill in every field with a whole number'
STYLE = """
.gradio-container { width: 100% !important; max-width: 1120px !important; margin: 0 auto; }
.gradio-container img { image-rendering: pixelated; }
#gallery, #gallery .grid-wrap { min-height: 0 !important; height: auto !important; }
#gallery .grid-container { padding: 4px; }
"""


def import_gradio() -> ModuleType:
    """gradio, told not to report to anybody.

    Raises:
        UsageError: If it is not installed.
    """
    os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
    try:
        import gradio
    except ImportError as e:
        raise UsageError(
            f'the demo needs gradio ({e}); install it: pip install "mmfgm[demo]"'
        ) from e
    return gradio


class Demo:
    """What the buttons of the page do.

    Args:
        inferencer (FGMInferencer): Whose networks are shown; the first of them is the generator.
        gallery (int): Seeds ``0 .. gallery - 1`` make the gallery.

    Raises:
        UsageError: If the model makes points rather than pictures.
    """

    def __init__(self, inferencer: FGMInferencer, gallery: int = 8):
        self.gradio = import_gradio()
        self.inferencer = inferencer
        self.network = inferencer.networks[0]
        self.steps = inferencer.default_sampling(self.network).nfe
        self.seeds = list(range(gallery))
        if len(inferencer.model.event_shape) != 3:
            raise UsageError(
                f'the model makes samples of shape {tuple(inferencer.model.event_shape)}, but the'
                ' page shows pictures; draw points with tools/test.py'
            )

    @property
    def teacher(self) -> str | None:
        """Name of the network to compare with, if there is one."""
        return (
            'teacher'
            if 'teacher' in self.inferencer.networks and self.network != 'teacher'
            else None
        )

    def warm_up(self) -> None:
        """Call every network once, so that the first visitor's latency is like the second's.

        Raises:
            UsageError: If the teacher cannot be loaded.
        """
        condition = '' if self.inferencer.condition == 'prompts' else 0
        self.pictures(condition, [0], self.network)
        try:
            if self.teacher:
                # few steps: both solvers take an even number
                self.pictures(condition, [0], self.teacher, 2)
        except UsageError as e:
            raise UsageError(
                f'the teacher cannot be shown: {e}; name it with --teacher, or write --teacher none'
            ) from e

    def pictures(
        self, condition: Any, seeds: list[int], network: str, nfe: int | None = None
    ) -> tuple[list[Image.Image], float]:
        """One picture for each seed, enlarged, and the seconds it took to make them."""
        inputs = len(seeds) if self.inferencer.condition == 'nothing' else [condition] * len(seeds)
        # solver, time grid and guidance as the config samples this network, whatever the number of
        # steps
        sampling = vars(self.inferencer.default_sampling(network))
        sampling = {**sampling, 'nfe': nfe or sampling['nfe']}
        start = time.perf_counter()
        images = self.inferencer(inputs, seeds=seeds, batch_size=len(seeds), **sampling)[
            'predictions'
        ]
        return [enlarge(image) for image in images], time.perf_counter() - start

    def generate(
        self, condition: Any, seed: Any, with_teacher: bool, nfe: Any, steps: Any = 0
    ) -> list:
        """Values of the two pictures, ``steps`` calls of the generator (0: as many as it
        has) and ``nfe`` of the teacher; the second is hidden unless it is asked for."""
        update = self.gradio.update
        steps = steps or self.steps
        (image,), seconds = self.pictures(condition, [seed], self.network, steps)
        shown = [update(value=image, label=caption(self.network, steps, seconds))]
        if self.teacher is None or not with_teacher:
            return [*shown, update(value=None, visible=False)]
        (image,), seconds = self.pictures(condition, [seed], self.teacher, nfe)
        return [
            *shown,
            update(value=image, visible=True, label=caption(self.teacher, nfe, seconds)),
        ]

    def preview(self, condition: Any, seed: Any) -> list:
        """Values of the two pictures while a visitor types: the generator's for what there is by
        now, and no teacher's, which would be for something else.

        What cannot be drawn leaves the last picture: half a word is no mistake.
        """
        try:
            if None in (condition, seed):
                raise UsageError(WHOLE_NUMBER)
            return self.generate(condition, seed, False, None)
        except (UsageError, NonFiniteError):
            return [self.gradio.skip()] * 2

    def gallery(self, condition: Any, steps: Any = 0) -> list:
        """Pictures of the fixed seeds, captioned."""
        images, _ = self.pictures(condition, self.seeds, self.network, steps or self.steps)
        return [(image, f'seed {seed}') for image, seed in zip(images, self.seeds)]

    def _checked(self, action: Callable) -> Callable:
        """``action`` with a user's mistakes shown on the page."""

        @functools.wraps(action)
        def checked(*args):
            try:
                if None in args:
                    raise UsageError(WHOLE_NUMBER)
                return action(*args)
            except (UsageError, NonFiniteError) as e:
                raise self.gradio.Error(str(e), print_exception=False) from e

        return checked

    def _number(self, value: int, **kwargs: Any):
        """``gradio.Number`` for whole numbers, which also tells programs that call the page what is
        wrong: gradio compares a text with the bounds, which ends in a traceback."""
        number = self.gradio.Number(value, precision=0, **kwargs)
        bounded = number.preprocess

        def preprocess(payload: Any) -> Any:
            whole = type(payload) is int or (type(payload) is float and payload.is_integer())
            low, high = kwargs['minimum'], kwargs['maximum']
            if payload is not None and not (whole and low <= payload <= high):
                raise self.gradio.Error(
                    f'{WHOLE_NUMBER} from {low} to {high}: {kwargs["label"]} is'
                    f' {str(payload)[:40]!r}',
                    print_exception=False,
                )
            return bounded(payload)

        number.preprocess = preprocess
        return number

    def build(self, about: str):
        """The page, as ``gradio.Blocks``."""
        gr = self.gradio
        most = self.inferencer.model.generators.get(self.network)
        with gr.Blocks(title='mmfgm', analytics_enabled=False, delete_cache=(KEPT, KEPT)) as blocks:
            gr.Markdown(f'# One-step generation\n{about}')
            with gr.Row():
                with gr.Column(scale=2, min_width=260):
                    condition = self._condition_input()
                    seed = self._number(
                        0, label='Seed', minimum=0, maximum=2**32 - 1, elem_id='seed'
                    )
                    other = gr.Button('Another seed', size='sm', elem_id='another')
                    with_teacher = gr.Checkbox(
                        False,
                        label='Teacher beside it',
                        visible=self.teacher is not None,
                        elem_id='with-teacher',
                    )
                    # no input of pages of one step, which programs call without
                    steps = [
                        gr.Slider(1, n, n, step=1, label="Generator's steps", elem_id='steps')
                        for n in [self.steps]
                        if most is not None and n > 1
                    ]
                    nfe = self._number(
                        self.inferencer.default_sampling(self.teacher).nfe if self.teacher else 1,
                        label="Teacher's network calls (NFE)",
                        minimum=1,
                        maximum=1000,
                        visible=self.teacher is not None,
                        elem_id='nfe',
                    )
                    generate = gr.Button('Generate', variant='primary', elem_id='generate')
                with gr.Column(scale=3, min_width=340), gr.Row():
                    image, compared = (
                        gr.Image(
                            type='pil',
                            format='png',
                            label=label,
                            interactive=False,
                            height=SHOWN_SIZE + 60,
                            buttons=['download'],
                            visible=label == self.network,
                            elem_id=name,
                        )
                        for label, name in ((self.network, 'image'), ('teacher', 'compared'))
                    )
            show = gr.Button(
                f'Gallery of the seeds 0 to {len(self.seeds) - 1}', elem_id='show-gallery'
            )
            gallery = gr.Gallery(
                show_label=False,
                columns=8,
                format='png',
                interactive=False,
                buttons=[],
                elem_id='gallery',
            )
            inputs = [condition, seed, with_teacher, nfe, *steps]
            gr.on(
                [
                    generate.click,
                    *([condition.submit] if hasattr(condition, 'submit') else []),
                    seed.submit,
                    *(slider.release for slider in steps),
                ],
                self._checked(self.generate),
                inputs,
                [image, compared],
                api_name='generate',
            )
            other.click(lambda: secrets.randbelow(2**32), None, seed, api_name=False).then(
                self._checked(self.generate), inputs, [image, compared], api_name=False
            )
            if most == 1:
                # from the start, and as one types: of the keys pressed meanwhile the last counts
                gr.on(
                    [blocks.load, condition.input, seed.input],
                    self.preview,
                    [condition, seed],
                    [image, compared],
                    trigger_mode='always_last',
                    show_progress='hidden',
                    api_name=False,
                )
            show.click(
                self._checked(self.gallery), [condition, *steps], gallery, api_name='gallery'
            )
        # one call at a time: networks share the machine, and a latency is of one call alone
        return blocks.queue(max_size=QUEUE, default_concurrency_limit=1)

    def _condition_input(self):
        gr = self.gradio
        kind = self.inferencer.condition
        if kind == 'prompts':
            return gr.Textbox(
                FIRST_PROMPT,
                label='Prompt',
                lines=2,
                max_lines=4,
                submit_btn=False,
                elem_id='condition',
            )
        last = self.inferencer.num_classes - 1
        return self._number(
            0,
            label=f'Class, 0 to {last}',
            minimum=0,
            maximum=max(last, 0),
            visible=kind == 'labels',
            elem_id='condition',
        )


def enlarge(image: Image.Image) -> Image.Image:
    """Repeat the pixels of a small picture, so that each can be seen."""
    factor = max(1, SHOWN_SIZE // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def caption(network: str, nfe: int, seconds: float) -> str:
    """What stands above a picture."""
    return f'{network}, {nfe} NFE, {1000 * seconds:.1f} ms'


def serve(
    config: str,
    weights: str | None = None,
    device: str | None = None,
    precision: str = 'fp32',
    teacher: str | None = None,
    gallery: int = 8,
    server_name: str = '127.0.0.1',
    port: int = 7860,
    auth_file: str | None = None,
    share: bool = False,
    without_password: bool = False,
) -> None:
    """Serve the page until it is interrupted.

    Args:
        config (str): Config, the work dir of a run, or the folder of an export.
        weights (str, optional), device (str, optional), precision (str): As for
            :class:`FGMInferencer`.
        teacher (str, optional): The teacher's checkpoint, or ``'none'`` to show no teacher.
            Defaults to the config's.
        gallery (int): Number of seeds in the gallery.
        server_name (str), port (int): Where to listen.
        auth_file (str, optional): See :func:`read_auth`.
        share (bool): Also give the page a public address through gradio's tunnel.
        without_password (bool): Do so without a password.

    Raises:
        UsageError: If something does not fit the model, nothing can listen there, or a page is to
            be shared without a password.
    """
    auth = read_auth(auth_file)
    if share and not auth and not without_password:
        raise UsageError(
            'a shared page has a public address, where anybody could use this machine: set a'
            f' password with --auth-file or {AUTH_VARIABLE}, or insist with'
            ' --share-without-password'
        )
    gradio = import_gradio()
    model = config
    if not is_export(model):
        weights = weights_of(config, weights)
        model = read_config(model)
        if teacher == 'none':
            model.model.pop('teacher', None)
        elif teacher:
            model.merge_from_dict({'model.teacher.checkpoint': teacher})
    elif teacher:
        raise UsageError(
            f'{model!r} is an export, which holds no teacher; leave --teacher out, or give a config'
        )
    page = Demo(FGMInferencer(model, weights, device, precision), gallery)
    page.warm_up()
    about = (
        f'`{config}`' + (f' with `{weights}`' if weights else '') + f' on {page.inferencer.device}'
    )
    # gradio's own folder is one for all of the machine's pages, and stays
    with tempfile.TemporaryDirectory(prefix='mmfgm_demo_') as folder:
        os.environ['GRADIO_TEMP_DIR'] = folder
        _launch(page.build(about), gradio, server_name, port, auth, share)


def read_auth(file: str | None) -> list[tuple[str, str]]:
    """Names and passwords of those who may open the page; none if everybody may.

    Neither is an argument of the command: every user of a machine sees those of all processes.

    Args:
        file (str, optional): Has a line ``USER:PASSWORD`` for each. Defaults to the environment
            variable ``MMFGM_DEMO_AUTH``, which holds such lines too.

    Raises:
        UsageError: If the file cannot be read, or holds something else.
    """
    source = file or AUTH_VARIABLE
    fix = 'write a line USER:PASSWORD for each who may open the page'
    text = read_text(file, fix) if file else os.environ.get(AUTH_VARIABLE, '')
    pairs = [line.partition(':') for line in text.splitlines() if line.strip()]
    # the message does not repeat what may be a password
    if not all(user.strip() and password.strip() for user, _, password in pairs):
        raise UsageError(f'a line of {source} is not USER:PASSWORD; {fix}')
    if file and not pairs:
        raise UsageError(f'{file!r} is empty; {fix}')
    return [(user.strip(), password.strip()) for user, _, password in pairs]


def _launch(
    blocks: Any,
    gradio: ModuleType,
    server_name: str,
    port: int,
    auth: list[tuple[str, str]],
    share: bool,
) -> None:
    """Serve until it is interrupted."""
    try:
        blocks.launch(
            server_name=server_name,
            server_port=port,
            share=share,
            auth=auth or None,
            max_file_size=UPLOAD_LIMIT,
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            theme=gradio.themes.Default(),
            css=STYLE,
        )
    except OSError as e:
        raise UsageError(
            f'cannot listen on {server_name}:{port}, perhaps because another program'
            ' does; choose another --port'
        ) from e
    if not auth and not server_name.startswith(('127.', 'localhost')):
        print(f'Everybody who reaches {server_name} may use it: no password is set', flush=True)
    address = blocks.share_url or f'http://{server_name}:{port}'
    print(f'Open {address} in a browser; Ctrl-C ends this', flush=True)
    blocks.block_thread()
