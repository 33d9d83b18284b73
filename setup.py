# Copyright (c) mmfgm authors.
"""What setup.cfg cannot do: put the assets, configs and tools where OpenMMLab looks for them, in
``mmfgm/.mim``."""

import os
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
MIM = ('assets', 'configs', 'tools', 'model-index.yml')


class BuildWithMim(build_py):
    """Copy them into the wheel."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / 'mmfgm' / '.mim'
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for name in MIM:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, target / name, ignore=shutil.ignore_patterns('__pycache__'))
            else:
                shutil.copy2(source, target / name)


class EditableWithMim(editable_wheel):
    """Link to them from an editable install, so that edits show at once."""

    def run(self):
        target = ROOT / 'mmfgm' / '.mim'
        target.mkdir(exist_ok=True)
        for name in MIM:
            link = target / name
            if link.is_symlink():
                link.unlink()
            os.symlink(os.path.relpath(ROOT / name, target), link)
        super().run()


setup(cmdclass=dict(build_py=BuildWithMim, editable_wheel=EditableWithMim))
