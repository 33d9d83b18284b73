# Copyright (c) mmfgm authors.
"""Exports on the Hugging Face hub."""

import os
import os.path as osp
from collections.abc import Iterator

from mmfgm.errors import UsageError
from mmfgm.models.families import hub_module

from .exporter import HERE


class HubRepository:
    """A model repository to put an export into, made before the work whose result it gets.

    Args:
        repo (str): ``OWNER/NAME``.
        private (bool): Of a new repository: only its owner sees it.

    Raises:
        UsageError: If the name is none, nobody is logged in, or the repository may not be written.
    """

    def __init__(self, repo: str, private: bool = False):
        hub = hub_module()
        try:
            hub.utils.validate_repo_id(repo)
        except ValueError as e:
            raise UsageError(f'expected a repository OWNER/NAME on the hub; {e}') from e
        if '/' not in repo:
            raise UsageError(
                f'expected a repository OWNER/NAME on the hub, found {repo!r}; add the owner'
            )
        self.repo = repo
        self.api = hub.HfApi()
        try:
            self.api.whoami()
            self.api.create_repo(repo, private=private, exist_ok=True)
        except OSError as e:  # of the hub and of the network alike
            raise UsageError(
                f'{repo!r} cannot be written on the hub: {str(e)[:400]}\nLog in with a token that'
                ' may write (hf auth login), or leave --push-to-hub out and upload the export later'
                ' (hf upload OWNER/NAME FOLDER)'
            ) from e

    def push(self, folder: str) -> str:
        """Put all files of an export into the repository, in one commit, and name the repository in
        the model card; returns its address.

        Raises:
            UsageError: If the hub does not take it; the export stays as it is.
        """
        add = hub_module().CommitOperationAdd

        def content(name: str) -> str | bytes:
            path = osp.join(folder, name)
            if name != 'README.md':
                return path
            with open(path, encoding='utf-8') as f:
                return f.read().replace(HERE, self.repo).encode()

        files = [add(name, content(name)) for name in sorted(_files(folder))]
        try:
            made = self.api.create_commit(
                self.repo, files, commit_message='A generator exported by mmfgm'
            )
        except OSError as e:
            raise UsageError(
                f'the export in {folder!r} is whole, but the hub did not take it: {str(e)[:400]}\n'
                f'Upload it later: hf upload {self.repo} {folder}'
            ) from e
        return made.commit_url


def _files(folder: str) -> Iterator[str]:
    """Paths of all files in a folder, as the hub writes them."""
    for where, _, names in os.walk(folder):
        for name in names:
            yield osp.relpath(osp.join(where, name), folder).replace(os.sep, '/')
