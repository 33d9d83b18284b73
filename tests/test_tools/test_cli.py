# Copyright (c) mmfgm authors.
"""What the commands share: how errors end, where their traceback goes, and options."""

import pytest
from mmengine.logging import MMLogger

from mmfgm.errors import EXIT_NON_FINITE, EXIT_USAGE, NonFiniteError, UsageError
from mmfgm.tools.cli import config_options, run_tool


@pytest.fixture
def log(tmp_path):
    """The log file of a run."""
    MMLogger.get_instance(f'test_cli_{tmp_path}', log_file=str(tmp_path / 'run.log'))
    return tmp_path / 'run.log'


def command(error):
    def raise_in_the_depths(argv):
        raise error

    return raise_in_the_depths


@pytest.mark.parametrize(
    'error, code',
    [(UsageError('wrong'), EXIT_USAGE), (NonFiniteError('wrong'), EXIT_NON_FINITE)],
)
@pytest.mark.parametrize('shown', [None, '0', '1'])
def test_a_message_on_the_terminal_and_the_traceback_in_the_log(
    error, code, shown, log, monkeypatch, capsys
):
    monkeypatch.delenv('MMFGM_TRACEBACK', raising=False)
    if shown is not None:
        monkeypatch.setenv('MMFGM_TRACEBACK', shown)
    with pytest.raises(SystemExit) as stop:
        run_tool(command(error))
    assert stop.value.code == code
    out, err = capsys.readouterr()
    assert err.endswith('\nerror: wrong\n')
    assert ('raise_in_the_depths' in out + err) == (shown == '1')
    assert 'raise_in_the_depths' in log.read_text()


def test_the_log_gets_the_traceback_of_any_other_error_too(log):
    with pytest.raises(ZeroDivisionError):
        run_tool(command(ZeroDivisionError('of a bug')))
    assert 'raise_in_the_depths' in log.read_text() and 'of a bug' in log.read_text()


def test_a_command_that_ends_itself_leaves_no_traceback(log):
    with pytest.raises(SystemExit) as stop:
        run_tool(command(SystemExit(75)))
    assert stop.value.code == 75 and 'Traceback' not in log.read_text()


def test_options_are_read_as_mmengine_reads_them():
    found = config_options(['a.b=1', 'c=[(1,x),2.5]', 'd=None', 'e=True', 'f=a=b', 'a.b=3'])
    assert found == {'a.b': 3, 'c': [(1, 'x'), 2.5], 'd': None, 'e': True, 'f': 'a=b'}
    assert config_options(None) == {}


@pytest.mark.parametrize('text', ['model', 'model=[1,(2]'])
def test_options_that_cannot_be_read_are_a_message(text):
    with pytest.raises(UsageError, match='expected KEY=VALUE, found'):
        config_options([text])
