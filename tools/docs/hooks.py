# Copyright (c) mmfgm authors.
"""What mkdocs.yml needs beside MkDocs: pages from outside docs/, and links that hold there too.

Links in our pages are those of the repository, so that they also work where it is read. On the site
a link to another page leads to that page, and a link to any other file of ours to the repository.
"""

import os.path as osp
import posixpath
import re

from mkdocs.structure.files import File

ROOT = osp.dirname(osp.dirname(osp.dirname(osp.abspath(__file__))))
# file of the repository -> page of the site
PAGES = {
    'README.md': 'start.md',
    'CONTRIBUTING.md': 'contributing.md',
    'CHANGELOG.md': 'changelog.md',
    'SECURITY.md': 'reporting.md',
    'configs/reflow/README.md': 'configs/reflow.md',
    'configs/fgm/README.md': 'configs/fgm.md',
    'configs/geneval/README.md': 'configs/geneval.md',
}
LINK = re.compile(r'(\]\()(?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?(\))')


def on_files(files, config):
    """Add the pages that are not in docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=osp.join(ROOT, source)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Let links lead to pages of the site where there are such, else to the repository."""
    sources = {osp.realpath(file.abs_src_path): file.src_uri for file in files if file.abs_src_path}
    folder = osp.dirname(page.file.abs_src_path)

    def site_link(match):
        opening, target, anchor, closing = match.groups()
        path = osp.realpath(osp.join(folder, target))
        if path in sources:
            target = posixpath.relpath(sources[path], posixpath.dirname(page.file.src_uri) or '.')
        elif osp.exists(path):
            target = f'{config.repo_url}/blob/main/{osp.relpath(path, ROOT)}'
        return f'{opening}{target}{anchor or ""}{closing}'

    return LINK.sub(site_link, markdown)
