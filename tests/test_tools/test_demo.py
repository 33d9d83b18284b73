# Copyright (c) mmfgm authors.
"""The demo page as visitors use it, in a headless browser."""

import io
import re
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

from mmfgm.apis import FGMInferencer
from mmfgm.apis.demo import FIRST_PROMPT, Demo
from mmfgm.errors import UsageError
from mmfgm.evaluation.shapes import THRESHOLD, detect
from mmfgm.tools.demo import demo
from tests.browser import free_port, open_browser
from tests.conftest import LIMIT, ROOT, tool_env, train
from tests.test_apis.conftest import DIGITS, SHAPES, TOY, make_problem


@pytest.fixture(scope='module')
def run(tiny, tmp_path_factory):
    """Work dir of a short training of a digits generator."""
    work_dir = tmp_path_factory.mktemp('generator')
    train(tiny / 'fgm.py', work_dir, 'evaluations.fd.interval=0', 'default_hooks.samples=None')
    return work_dir


@pytest.fixture(scope='module')
def url(tiny, run, tmp_path_factory):
    """Where ``tools/demo.py`` serves that generator."""
    port, log = free_port(), tmp_path_factory.mktemp('log') / 'log'
    with open(log, 'w') as f:
        server = subprocess.Popen(
            [
                sys.executable,
                ROOT / 'tools' / 'demo.py',
                tiny / 'fgm.py',
                run,
                '--port',
                str(port),
                '--gallery',
                '3',
            ],
            env=tool_env(),
            stdout=f,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + LIMIT
        while server.poll() is None and time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f'http://127.0.0.1:{port}', timeout=LIMIT).close()
                break
            except OSError:
                time.sleep(0.2)
        else:
            pytest.fail(f'the demo did not start:\n{log.read_text()[-3000:]}')
        yield f'http://127.0.0.1:{port}'
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope='module')
def browser():
    with open_browser() as browser:
        yield browser


class Visitor:
    """One visitor with cookies of their own."""

    def __init__(self, browser, url):
        self.requested = []
        self.page = browser.new_context(viewport=dict(width=1200, height=900)).new_page()
        self.page.set_default_timeout(1000 * LIMIT)
        self.page.on('request', lambda request: self.requested.append(request.url))
        self.page.goto(url)
        self.page.wait_for_selector('#generate')

    def fill(self, **values):
        for name, value in values.items():
            self.page.fill(f'#{name} input, #{name} textarea', str(value))

    def source(self, box='image'):
        images = self.page.locator(f'#{box} img')
        return images.first.get_attribute('src') if images.count() else None

    def picture(self, box='image', before=None, mode='L'):
        """Pixels of a picture, once it is another than ``before``."""
        self.page.wait_for_function(
            '([box, before]) => {const i = document.querySelector(`#${box} img`); '
            'return i && i.complete && i.naturalWidth && i.getAttribute("src") !== before}',
            arg=[box, before],
        )
        return np.asarray(
            Image.open(io.BytesIO(self.page.request.get(self.source(box)).body())).convert(mode)
        )

    def settle(self, expected, box='image'):
        """Wait until the page shows that picture."""
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            if self.source(box) and np.array_equal(self.picture(box), expected):
                return
            self.page.wait_for_timeout(50)
        pytest.fail('the page shows another picture')

    def generate(self, expected, **values):
        self.fill(**values)
        self.page.click('#generate')
        self.settle(expected)


@pytest.fixture(scope='module')
def expected(tiny, run):
    """What the inferencer makes of a class and a seed, each pixel repeated 40 times."""
    inferencer = FGMInferencer(str(tiny / 'fgm.py'), str(run))

    def make(label, seed, **kwargs):
        return (
            np.asarray(inferencer(label, seeds=[seed], **kwargs)['predictions'][0])
            .repeat(40, 0)
            .repeat(40, 1)
        )

    return make


@pytest.mark.slow
def test_a_visitor_gets_what_the_inferencer_makes(browser, url, expected):
    visitor = Visitor(browser, url)
    # a picture from the start, and one for each number that is typed
    visitor.settle(expected(0, 0))
    visitor.fill(condition=3)
    visitor.settle(expected(3, 0))
    visitor.fill(seed=5)
    visitor.settle(expected(3, 5))
    assert expected(3, 5).shape == (320, 320)
    assert 'generator_ema, 1 NFE' in visitor.page.inner_text(
        '#image'
    ) and ' ms' in visitor.page.inner_text('#image')
    visitor.generate(expected(3, 6), seed=6)
    visitor.generate(expected(3, 5), seed=5)
    visitor.generate(expected(8, 5), condition=8)
    assert not np.array_equal(expected(3, 5), expected(3, 6))
    # the teacher beside it, at as many calls as asked for
    assert not visitor.page.is_visible('#compared')
    visitor.page.check('#with-teacher input')
    visitor.fill(nfe=7)
    visitor.page.click('#generate')
    assert np.array_equal(visitor.picture('compared'), expected(8, 5, network='teacher', nfe=7))
    assert 'teacher, 7 NFE' in visitor.page.inner_text('#compared')
    # the teacher's picture goes when it no longer belongs to what is asked for
    visitor.fill(seed=4)
    visitor.settle(expected(8, 4))
    assert not visitor.page.is_visible('#compared')
    visitor.fill(seed=5)
    visitor.settle(expected(8, 5))
    # the gallery's pictures are those of its seeds
    visitor.page.click('#show-gallery')
    assert np.array_equal(visitor.picture('gallery'), expected(8, 0))
    assert visitor.page.locator('#gallery img').count() == 3
    assert all(address.startswith((url, 'data:', 'blob:')) for address in visitor.requested), (
        visitor.requested
    )


@pytest.mark.slow
def test_a_mistake_is_shown_and_changes_nothing(browser, url, expected):
    visitor = Visitor(browser, url)
    visitor.generate(expected(1, 1), condition=1, seed=1)
    before = visitor.source()
    visitor.fill(condition='', seed=1)
    visitor.page.click('#generate')
    visitor.page.wait_for_selector('text=fill in every field with a whole number')
    assert visitor.source() == before


@pytest.mark.slow
def test_two_visitors_at_once_each_get_their_own(browser, url, expected):
    visitors = [Visitor(browser, url) for _ in range(2)]
    for round_ in range(3):
        for i, visitor in enumerate(visitors):
            visitor.fill(condition=4 + i, seed=10 * round_ + i)
        for visitor in visitors:
            visitor.page.click('#generate', no_wait_after=True)
        for i, visitor in enumerate(visitors):
            visitor.settle(expected(4 + i, 10 * round_ + i))


@contextmanager
def serving(page):
    """The address of a page of this process."""
    page.warm_up()
    blocks = page.build('about')
    _, url, _ = blocks.launch(
        prevent_thread_lock=True,
        quiet=True,
        ssr_mode=False,
        share=False,
        server_name='127.0.0.1',
        server_port=free_port(),
    )
    try:
        yield url
    finally:
        blocks.close()


@pytest.mark.slow
def test_prompts(browser, tmp_path):
    problem = make_problem(tmp_path, SHAPES)
    page = Demo(FGMInferencer(problem.config, problem.weights), gallery=2)
    with serving(page) as url:
        visitor = Visitor(browser, url)

        def expected(prompt, **kwargs):
            (image,) = page.inferencer(prompt, seeds=[3], **kwargs)['predictions']
            return np.asarray(image.convert('L')).repeat(10, 0).repeat(10, 1)

        red = expected('a red square')
        visitor.fill(seed=3)
        visitor.settle(expected(FIRST_PROMPT))
        # key by key, and half a word changes nothing
        visitor.page.fill('#condition textarea', '')
        visitor.page.type('#condition textarea', 'a red')
        visitor.settle(expected('a red'))
        visitor.page.type('#condition textarea', ' squ')
        visitor.settle(expected('a red'))
        visitor.page.type('#condition textarea', 'are')
        visitor.settle(red)
        # the teacher at any number of steps, with the guidance that the config samples it with
        visitor.page.check('#with-teacher input')
        visitor.fill(nfe=3)
        visitor.page.click('#generate')
        visitor.settle(expected('a red square', network='teacher', nfe=3, guidance=2.0), 'compared')
        visitor.generate(expected('a blue circle'), condition='a blue circle')
        assert not np.array_equal(expected('a blue circle'), red)
        visitor.page.fill('#condition textarea', '')
        visitor.page.type('#condition textarea', 'a red')
        visitor.settle(expected('a red'))
        visitor.page.type('#condition textarea', ' elephant')
        # not as one types
        visitor.settle(expected('a red'))
        assert not visitor.page.locator("text=the word 'elephant'").count()
        visitor.page.click('#generate')
        visitor.page.wait_for_selector("text=the word 'elephant' of the prompt")


# of the released generator's pictures that are what their caption says, as most are
SEED = 0


@pytest.mark.slow
def test_what_is_typed_is_seen_in_the_picture(browser):
    """By the generator that comes with mmfgm, and the exact detector on what the page shows."""
    page = Demo(
        FGMInferencer('mmfgm::fgm/shapes_small.py', 'mmfgm::assets/shapes/generator.safetensors'),
        gallery=2,
    )
    with serving(page) as url:
        visitor = Visitor(browser, url)
        visitor.fill(seed=SEED)
        for caption, seen in {
            FIRST_PROMPT: dict(circle=['red'], square=['blue']),
            'a green triangle': dict(triangle=['green']),
        }.items():
            visitor.page.fill('#condition textarea', '')
            visitor.page.type('#condition textarea', caption)
            (image,) = page.inferencer(caption, seeds=[SEED])['predictions']
            visitor.settle(np.asarray(image.convert('L')).repeat(13, 0).repeat(13, 1))
            shown = visitor.picture(mode='RGB')[6::13, 6::13]
            assert np.array_equal(shown, np.asarray(image))
            ((boxes, colors),) = detect(torch.from_numpy(shown.copy()).permute(2, 0, 1)[None])
            # as the scores count: what is like enough to a shape
            found = {
                shape: [color for color, row in zip(colors[shape], rows) if row[4] >= THRESHOLD]
                for shape, rows in boxes.items()
            }
            assert {shape: names for shape, names in found.items() if names} == seen
            if 'left of' in caption:
                assert boxes['circle'][0][[0, 2]].mean() < boxes['square'][0][[0, 2]].mean()


@pytest.mark.slow
def test_steps_of_a_generator_of_several(browser, tmp_path):
    problem = make_problem(
        tmp_path,
        DIGITS + "\nmodel['generator'] = dict(_delete_=True, type='FewStepGenerator', times=4)",
    )
    page = Demo(FGMInferencer(problem.config, problem.weights), gallery=2)

    def expected(nfe):
        (image,) = page.inferencer(7, seeds=[3], nfe=nfe)['predictions']
        return np.asarray(image.convert('L')).repeat(40, 0).repeat(40, 1)

    assert not np.array_equal(expected(2), expected(4))
    with serving(page) as url:
        visitor = Visitor(browser, url)
        visitor.generate(expected(4), condition=7, seed=3)
        visitor.page.fill('#steps input[type=number]', '2')
        visitor.page.click('#generate')
        visitor.settle(expected(2))
        assert 'generator_ema, 2 NFE' in visitor.page.inner_text('#image')


def test_bad_input(tiny, tmp_path, monkeypatch):
    for argv, message in [
        (['--port', '0'], '--port in'),
        (['--gallery', '0'], '--gallery must be at least 1'),
    ]:
        with pytest.raises(UsageError, match=message):
            demo([str(tiny / 'fgm.py'), *argv])
    with pytest.raises(UsageError, match='the teacher cannot be shown: .*--teacher none'):
        problem = make_problem(tmp_path, SHAPES)
        demo([problem.config, problem.weights, '--teacher', 'nowhere.pth'])
    with socket.socket() as other:
        other.bind(('127.0.0.1', 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UsageError, match=f'cannot listen on 127.0.0.1:{port}'):
            demo([problem.config, problem.weights, '--teacher', 'none', '--port', str(port)])
    (tmp_path / 'toy').mkdir()
    toy = make_problem(tmp_path / 'toy', TOY)
    with pytest.raises(UsageError, match='the page shows pictures'):
        demo([toy.config, toy.weights])
    monkeypatch.setitem(sys.modules, 'gradio', None)
    with pytest.raises(UsageError, match=re.escape('pip install "mmfgm[demo]"')):
        demo([problem.config, problem.weights])
