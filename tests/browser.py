# Copyright (c) mmfgm authors.
"""A headless browser for the tests of pages."""
import os
import shutil
from contextlib import contextmanager

import pytest

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')


@contextmanager
def open_browser():
    """Start the system's Chromium; fails, naming what to install, where there is none."""
    from playwright.sync_api import sync_playwright
    found = [path for name in (os.environ.get('CHROMIUM', ''), *NAMES) if (path := shutil.which(name))]
    if not found:
        pytest.fail('the browser tests need Chromium or Chrome: run `bash tools/install_browser.sh` as root, or set CHROMIUM '
                    'to its executable')
    with sync_playwright() as playwright:
        # root in a container has no sandbox and little shared memory
        browser = playwright.chromium.launch(executable_path=found[0], args=['--no-sandbox', '--disable-gpu',
                                                                             '--disable-dev-shm-usage'])
        try:
            yield browser
        finally:
            browser.close()
