# Copyright (c) mmfgm authors.
"""Files and folders that appear only when they are whole, checksums, and JSON.

Everything that must survive a crash is written here: beside its final name first, then flushed to
the disk, then renamed. A reader sees the old content or the new, never half of it.
"""

import errno
import hashlib
import json
import os
import os.path as osp
import shutil
import stat
import sys
import tempfile
import threading
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmfgm.errors import UsageError

# manifests, metadata and logs of the longest runs have some hundred MB
MAX_TEXT = 1 << 30
MAX_PICTURE = 1 << 28
# what names a file that comes with mmfgm begins with
ASSETS = 'mmfgm::assets/'


def sha256(path: str) -> str:
    """Hex digest of a file."""
    check_regular(path)
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        for chunk in iter(lambda: f.read(1 << 20), b''):
            digest.update(chunk)
    return digest.hexdigest()


def check_regular(path: str) -> None:
    """Refuse a pipe, a device or a socket, before opening it waits for ever or never ends.

    Raises:
        UsageError: If there is something at ``path`` that is neither a file nor a folder.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # whoever opens it says what is wrong
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UsageError(f'{path!r} is a pipe, a device or a socket; name a regular file')


def read_text(path: str, fix: str, limit: int = MAX_TEXT) -> str:
    """The content of a text file in UTF-8, with or without a byte order mark.

    Args:
        path (str): The file.
        fix (str): What the message tells the user to do where it cannot be read.
        limit (int): Bytes that no such file has.

    Raises:
        UsageError: If it is no file, is too large, or is no text.
    """
    check_regular(path)
    try:
        if os.path.getsize(path) > limit:
            raise ValueError(f'it has more than {limit:,} bytes')
        with open(path, encoding='utf-8-sig') as f:
            return f.read()
    except (OSError, ValueError) as e:
        raise UsageError(f'{path!r} cannot be read ({e!r}); {fix}') from e


def parse_json(text: str | bytes, kind: type = object) -> Any:
    """A JSON document; whatever is wrong with it is a ValueError.

    Args:
        text (str | bytes): The document.
        kind (type): What it must be, such as ``dict``. Defaults to anything.

    Raises:
        ValueError: If it is no JSON, too deeply nested, or of another kind.
    """
    try:
        content = json.loads(text)
    except RecursionError as e:
        raise ValueError('it is nested too deeply') from e
    if not isinstance(content, kind):
        name = dict(dict='an object', list='a list').get(kind.__name__, kind.__name__)
        raise ValueError(f'it is {type(content).__name__} {str(content)[:40]!r}, expected {name}')
    return content


def asset_path(name: str) -> str:
    """The file that ``mmfgm::assets/PATH`` means, of those that come with mmfgm; any other name is
    a path already, and passes.

    They lie in ``.mim``, which a wheel holds and an editable install links, or else beside the
    package, in a clone that was installed before it had any. ``assets/assets.json`` holds a
    checksum of each.

    Raises:
        UsageError: If there is none of that name, or it is not the one that was released.
    """
    if not name.startswith(ASSETS):
        return name
    name = name[len(ASSETS) :]
    package = osp.dirname(osp.abspath(__file__))
    for folder in (osp.join(package, '.mim', 'assets'), osp.join(osp.dirname(package), 'assets')):
        index = osp.join(folder, 'assets.json')
        if osp.isfile(index):
            break
    else:
        raise UsageError(
            f'{ASSETS}{name} was asked for, but this installation of mmfgm has no assets; install'
            ' it again: pip install -e . in a clone, or a whole wheel'
        )
    known = read_json(index, 'get it again: git checkout assets, or install mmfgm again', dict)
    if name not in known:
        raise UsageError(
            f'there is no asset {ASSETS}{name}; name one of'
            f' {", ".join(ASSETS + other for other in sorted(known))}'
        )
    path = osp.realpath(osp.join(folder, *name.split('/')))
    found = sha256(path) if osp.isfile(path) else None
    if found != known[name]['sha256']:
        what = 'is missing' if found is None else f'has the SHA-256 {found[:8]}...'
        raise UsageError(
            f'{path!r} {what}, not {known[name]["sha256"][:8]}... of the file that was released;'
            f' get it again (git checkout assets, or install mmfgm again), or copy your own'
            ' elsewhere and name that path'
        )
    return path


def read_json(path: str, fix: str, kind: type = object) -> Any:
    """The content of a JSON file.

    Args:
        path (str): The file.
        fix (str): What the message tells the user to do where it cannot be read.
        kind (type): See :func:`parse_json`.

    Raises:
        UsageError: If it cannot be read, is not JSON, or of another kind.
    """
    try:
        return parse_json(read_text(path, fix), kind)
    except UsageError:
        raise
    except ValueError as e:
        raise UsageError(f'{path!r} is damaged ({e!r}); {fix}') from e


def seal(content: dict[str, Any], key: str = 'checksum') -> dict[str, Any]:
    """``content`` with a checksum of all of it as ``key``: it finds damage, as a forger makes
    another.

    See :func:`check_seal`.
    """
    return {**content, key: _checksum(content, key)}


def check_seal(content: dict[str, Any], key: str = 'checksum') -> None:
    """Hold what was read from a JSON file against its checksum; files without one are older, or
    were made by hand.

    Raises:
        ValueError: If it is of another content.
    """
    if key in content and content[key] != _checksum(content, key):
        raise ValueError(
            'its checksum is of another content; where it was changed on purpose, delete the key'
            f' {key!r}'
        )


def _checksum(content: dict[str, Any], key: str) -> str:
    # as it will be read: keys are texts, tuples are lists
    sealed = json.loads(json.dumps({k: v for k, v in content.items() if k != key}))
    return hashlib.sha256(json.dumps(sealed, sort_keys=True).encode()).hexdigest()


def read_json_lines(
    path: str, fix: str, torn: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a file with one JSON object a line, each with its line's number; blank lines
    are left out.

    Args:
        path (str): The file.
        fix (str): What the message tells the user to do where a line cannot be read.
        torn (bool): Leave out a last line that is no object: a process was killed as it wrote it.

    Raises:
        UsageError: Names the line.
    """
    # not splitlines(): JSON may hold U+2028 as it is
    lines = read_text(path, fix).split('\n')
    last = max((number for number, line in enumerate(lines, 1) if line.strip()), default=0)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line, dict)
        except ValueError as e:
            if torn and number == last:
                return
            raise UsageError(f'{path!r}, line {number} is not a JSON object ({e}); {fix}') from e
        yield number, row


def read_member(archive: zipfile.ZipFile, name: str, limit: int = MAX_PICTURE) -> bytes:
    """A file out of an archive, unless it would fill the memory.

    Raises:
        UsageError: If it is damaged, encrypted, or larger than ``limit`` bytes by what the archive
            says; no more than that is unpacked.
    """
    try:
        size = archive.getinfo(name).file_size
        if size > limit:
            raise ValueError(f'it unpacks to {size:,} bytes, more than {limit:,}')
        return archive.read(name)
    # whatever the library raises is about the file; RuntimeError: it is encrypted
    except Exception as e:
        raise UsageError(
            f'{name!r} in {archive.filename!r} cannot be unpacked ({e!r}); make the archive again'
        ) from e


def files_below(folder: str) -> list[str]:
    """Relative names, with ``/``, of all that is below a folder and is no folder.

    Links are followed, but not to a folder that they lie in, where a walk would not end.

    Raises:
        OSError: If a folder cannot be listed.
    """
    names = []
    top = os.stat(folder)
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [('', ((top.st_dev, top.st_ino),))]
    while waiting:
        prefix, above = waiting.pop()
        with os.scandir(osp.join(folder, prefix)) as entries:
            for entry in entries:
                name = prefix + entry.name
                if not entry.is_dir():
                    names.append(name)
                    continue
                found = os.stat(entry.path)
                if (found.st_dev, found.st_ino) not in above:
                    waiting.append((f'{name}/', (*above, (found.st_dev, found.st_ino))))
    return names


def differences(expected: Any, found: Any, name: str = '') -> Iterator[str]:
    """What differs between two nested dicts, each as ``'a.b is 1, expected 2'``."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted({*expected, *found}):
            yield from differences(
                expected.get(key), found.get(key), f'{name}.{key}' if name else key
            )
    elif expected != found:
        yield f'{name} is {str(found)[:80]}, expected {str(expected)[:80]}'


@contextmanager
def whole_file(path: str) -> Iterator[str]:
    """A file to write, that gets its name only when the block ends without an error.

    Args:
        path (str): Its name; a file of this name is replaced.

    Yields:
        str: The name to write to meanwhile.

    Raises:
        OSError: If it cannot be written. Nothing of it stays.
    """
    # Processes of several machines may have the same number.
    unfinished = f'{path}.{uuid.uuid4().hex}.tmp'
    try:
        with open(unfinished, 'xb'):
            pass
        mode = os.stat(unfinished).st_mode
        yield unfinished
        # Some writers, such as safetensors, replace it by a file that only its owner may read.
        os.chmod(unfinished, mode)
        _flush(unfinished)
        os.replace(unfinished, path)
        _flush(osp.dirname(path) or '.')
    finally:
        if osp.exists(unfinished):
            os.remove(unfinished)


def write_file(path: str, content: bytes | str) -> None:
    """Write a file that appears only when it is complete.

    Raises:
        UsageError: If it cannot be written.
    """
    try:
        with whole_file(path) as unfinished, open(unfinished, 'wb') as f:
            f.write(content.encode() if isinstance(content, str) else content)
    except OSError as e:
        raise UsageError(
            f'{path!r} cannot be written: {e}; make room, or choose another place'
        ) from e


def replace_folder(unfinished: str, out: str) -> None:
    """Give a finished folder its name.

    A folder of that name is moved aside rather than deleted first, so that there is never a moment
    without a whole one on disk; it comes back where the new one does not get its name.
    """
    for folder, _, names in os.walk(unfinished):
        for name in (*names, ''):
            _flush(osp.join(folder, name))
    old = f'{unfinished.removesuffix(".tmp")}.old.tmp'
    try:
        if osp.lexists(out):
            shutil.rmtree(old, ignore_errors=True)
            os.rename(out, old)
        os.rename(unfinished, out)
    except BaseException:
        if osp.lexists(old) and not osp.lexists(out):
            os.rename(old, out)
        raise
    _flush(osp.dirname(out) or '.')
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def whole_folder(out: str, force: bool, marker: str) -> Iterator[str]:
    """A folder to write into, that gets its name only when the block ends without an error.

    Args:
        out (str): Its name.
        force (bool): Replace what has the name already, if that was written by the same tool.
        marker (str): File by which the tool knows its folders.

    Yields:
        str: The folder to write into meanwhile.

    Raises:
        UsageError: If ``out`` exists and may not be replaced, or cannot be written.
    """
    out = osp.normpath(out)
    _check_replaceable(out, force, marker)
    unfinished = f'{out}.{uuid.uuid4().hex}.tmp'
    try:
        os.makedirs(unfinished)
    except OSError as e:
        raise UsageError(
            f'{out!r} cannot be written: {e.strerror or e}; name a folder where you may write'
        ) from e
    try:
        yield unfinished
        # something may have taken the name meanwhile
        _check_replaceable(out, force, marker)
        replace_folder(unfinished, out)
    except UsageError:
        raise
    except Exception as e:  # each library that writes has errors of its own
        if not _is_about_writing(e, out):
            raise
        raise UsageError(
            f'{out!r} cannot be written: {e}; make room, or name a folder where you may write'
        ) from e
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def disk_errors(folder: str, then: str) -> Iterator[None]:
    """One message for a disk that fills up, or a folder that is deleted, while the block writes.

    Args:
        folder (str): Where the block writes.
        then (str): What the user does after making room.

    Raises:
        UsageError: Instead of the errors that each library has for it.
    """
    existed = osp.isdir(folder)
    try:
        with _terse_threads():
            yield
    except UsageError:
        raise
    except Exception as e:  # each library that writes has errors of its own
        lost = existed and not osp.isdir(folder)
        if lost and isinstance(e, (OSError, RuntimeError)):
            raise UsageError(
                f'{folder!r} was deleted or unmounted while it was written to ({_words(e)}); put it'
                ' back if you can, and start again'
            ) from e
        if not is_disk_error(e):
            raise
        raise UsageError(
            f'{folder!r} cannot be written: {_words(e)}; make room, then {then}'
        ) from e


@contextmanager
def _terse_threads() -> Iterator[None]:
    """Threads that cannot write say so in one line, for those of TensorBoard hand their error on to
    whoever writes next."""
    usual = threading.excepthook

    def say(args: threading.ExceptHookArgs) -> None:
        if isinstance(args.exc_value, OSError):
            name = args.thread.name if args.thread else 'a thread'
            print(f'{name} stopped: {args.exc_value}', file=sys.stderr)
        else:
            usual(args)

    threading.excepthook = say
    try:
        yield
    finally:
        threading.excepthook = usual


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _words(error: BaseException) -> str:
    """What the system said, where it is not hidden by what a library made of it."""
    said = [e.strerror for e in _causes(error) if isinstance(e, OSError) and e.strerror]
    return said[0] if said else str(error)[:200]


def check_work_dir(work_dir: str) -> None:
    """Make the work directory and write in it.

    Raises:
        UsageError: If that fails.
    """
    try:
        os.makedirs(work_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=work_dir):
            pass
    except OSError as e:
        raise UsageError(
            f'work_dir {work_dir!r} cannot be written to: {e.strerror or e}; choose another with'
            ' --work-dir'
        ) from e


def _check_replaceable(out: str, force: bool, marker: str) -> None:
    if osp.lexists(out) and not force:
        raise UsageError(f'{out!r} exists; replace it with --force, or name another')
    empty = osp.isdir(out) and not os.listdir(out)
    if osp.lexists(out) and not osp.isfile(osp.join(out, marker)) and not empty:
        raise UsageError(
            f'{out!r} holds no {marker}, so it was not written by this tool, and --force does not'
            ' delete it; name another folder'
        )


def is_disk_error(error: BaseException) -> bool:
    """Whether the disk, or a quota, is full, or has become read-only."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
    # safetensors and shutil hand on the system's words, but not its number; torch's writer of zip
    # files only notices that it is not where it should be
    words = (*map(os.strerror, codes), 'inline_container')
    return any(
        getattr(e, 'errno', None) in codes or any(word in str(e) for word in words)
        for e in _causes(error)
    )


def _is_about_writing(error: Exception, out: str) -> bool:
    """Whether it is about the disk, or the file is ``out`` or one of those written in its place."""
    return is_disk_error(error) or str(getattr(error, 'filename', None) or '').startswith(out)


def _flush(path: str) -> None:
    """Make a file's content, or a folder's names, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot flush folders
            raise
    finally:
        os.close(handle)
