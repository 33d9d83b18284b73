# Copyright (c) mmfgm authors.
"""A headless browser for the tests of pages, and a port to serve them at."""

import os
import shutil
import socket
from contextlib import contextmanager

import pytest

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')


def free_port():
    """A port that nothing listens on."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@contextmanager
def open_browser():
    """Start the system's Chromium; fails, naming what to install, where there is none."""
    from playwright.sync_api import sync_playwright

    found = [
        path for name in (os.environ.get('CHROMIUM', ''), *NAMES) if (path := shutil.which(name))
    ]
    if not found:
        pytest.fail(
            'the browser tests need Chromium or Chrome: run `bash tools/install_browser.sh` as'
            ' root, or set CHROMIUM to its executable'
        )
    with sync_playwright() as playwright:
        # root in a container has no sandbox and little shared memory
        browser = playwright.chromium.launch(
            executable_path=found[0],
            args=['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage'],
        )
        try:
            yield browser
        finally:
            browser.close()
