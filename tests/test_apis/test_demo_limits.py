# Copyright (c) mmfgm authors.
"""What the demo page takes from those who can reach it, without a browser."""

import json
import os
import threading
import time
from pathlib import Path

import pytest
import requests

from mmfgm.apis import FGMInferencer, demo
from mmfgm.apis.demo import Demo, read_auth
from mmfgm.errors import UsageError
from mmfgm.tools.demo import demo as tool
from tests.browser import free_port
from tests.conftest import LIMIT


class Stop(Exception):
    """What ends a server in these tests, where a user would press Ctrl-C."""


def serve(problem, monkeypatch, meet, *argv):
    """Serve as the command does, and call ``meet(url)`` beside it."""
    gradio = demo.import_gradio()
    port = free_port()
    monkeypatch.setenv('GRADIO_TEMP_DIR', 'unset')

    def block(blocks):
        try:
            meet(f'http://127.0.0.1:{port}')
        finally:
            blocks.close()
        raise Stop

    monkeypatch.setattr(gradio.Blocks, 'block_thread', block)
    with pytest.raises(Stop):
        tool([problem.config, problem.weights, '--port', str(port), '--gallery', '2', *argv])


def call(url, name, *data, session=requests):
    """What a program gets from the page's API: the last event and its data."""
    path = f'{url}/gradio_api/call/{name}'
    event = session.post(path, json=dict(data=data), timeout=LIMIT).json()['event_id']
    lines = session.get(f'{path}/{event}', timeout=LIMIT).text.splitlines()
    events = [line.removeprefix('event: ') for line in lines if line.startswith('event: ')]
    return events[-1], [line for line in lines if line.startswith('data: ')][-1]


def test_calls_uploads_and_pictures(digits, monkeypatch, capfd):
    folders = []

    def meet(url):
        folder = Path(os.environ['GRADIO_TEMP_DIR'])
        folders.append(folder)
        kind, data = call(url, 'generate', 3, 5, False, 1)
        assert kind == 'complete'
        picture = Path(json.loads(data.removeprefix('data: '))[0]['value']['path'])
        assert folder in picture.parents and picture.is_file()
        wrong = [('x', 5), (3, 'x'), (3, [1]), (3, True), (3.5, 5), ('1e400', 5), (10, 5), (3, -1)]
        for condition, seed in wrong:
            kind, data = call(url, 'generate', condition, seed, False, 1)
            assert kind == 'error', (condition, seed)
        sent = requests.post(
            f'{url}/gradio_api/upload',
            files=dict(files=('film.bin', bytes(1 << 20))),
            timeout=LIMIT,
        )
        assert sent.status_code == 413
        assert not any(path.name == 'film.bin' for path in folder.rglob('*'))

    serve(digits, monkeypatch, meet)
    assert not folders[0].exists()
    assert 'Traceback' not in capfd.readouterr().err


def test_a_password_is_asked_for(digits, monkeypatch, tmp_path):
    (tmp_path / 'auth').write_text('ann:se:cret\n\nbob:other\n')

    def meet(url):
        assert requests.get(f'{url}/config', timeout=LIMIT).status_code == 401
        body = dict(data=[3, 5, False, 1])
        refused = requests.post(f'{url}/gradio_api/call/generate', json=body, timeout=LIMIT)
        assert refused.status_code == 401
        session = requests.Session()
        for password, status in (('wrong', 400), ('se:cret', 200)):
            answer = session.post(
                f'{url}/login', data=dict(username='ann', password=password), timeout=LIMIT
            )
            assert answer.status_code == status
        assert session.get(f'{url}/config', timeout=LIMIT).status_code == 200

    serve(digits, monkeypatch, meet, '--auth-file', str(tmp_path / 'auth'))


def test_the_queue_ends(digits, monkeypatch):
    monkeypatch.setattr(demo, 'QUEUE', 2)
    held = threading.Event()
    made = Demo.pictures

    def slow(self, condition, seeds, network, nfe=None):
        if condition == 7:
            held.wait(LIMIT)
        return made(self, condition, seeds, network, nfe)

    monkeypatch.setattr(Demo, 'pictures', slow)

    def meet(url):
        results = []
        waiting = [
            threading.Thread(
                target=lambda: results.append(call(url, 'generate', 7, 5, False, 1)[0])
            )
            for _ in range(3)
        ]
        for thread in waiting:
            thread.start()
            time.sleep(1)  # the first is being made and waits for nothing, two more wait
        answer = requests.post(
            f'{url}/gradio_api/call/generate', json=dict(data=[3, 5, False, 1]), timeout=LIMIT
        )
        held.set()
        for thread in waiting:
            thread.join(LIMIT)
        assert answer.status_code == 503 and 'full' in answer.text.lower()
        assert results == ['complete'] * 3

    serve(digits, monkeypatch, meet)


def test_sharing_needs_a_password(digits, monkeypatch):
    monkeypatch.delenv(demo.AUTH_VARIABLE, raising=False)
    with pytest.raises(UsageError, match='--share-without-password'):
        tool([digits.config, digits.weights, '--share'])


@pytest.mark.parametrize('content', ['ann', 'ann:', ':secret', 'a:b\nsecret', '', '\n'])
def test_bad_passwords_are_not_repeated(content, tmp_path, monkeypatch):
    (tmp_path / 'auth').write_text(content)
    with pytest.raises(UsageError, match='USER:PASSWORD') as found:
        read_auth(str(tmp_path / 'auth'))
    assert 'secret' not in str(found.value)
    if content.strip():
        monkeypatch.setenv(demo.AUTH_VARIABLE, content)
        with pytest.raises(UsageError, match=demo.AUTH_VARIABLE):
            read_auth(None)


def test_the_password_may_come_from_the_environment(monkeypatch):
    monkeypatch.delenv(demo.AUTH_VARIABLE, raising=False)
    assert read_auth(None) == []
    monkeypatch.setenv(demo.AUTH_VARIABLE, 'ann:se:cret')
    assert read_auth(None) == [('ann', 'se:cret')]


def test_what_is_not_finite_is_told(digits):
    page = Demo(FGMInferencer(digits.config, digits.weights), 2)
    page.inferencer.model.networks['generator_ema'].network.input.weight.data[:] = float('nan')
    with pytest.raises(page.gradio.Error, match='inf or nan'):
        page._checked(page.generate)(3, 5, False, 1)
