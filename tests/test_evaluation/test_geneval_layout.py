# Copyright (c) mmfgm authors.
"""Folders and results against the reference's own rules, spelled again here; verdicts that survive
a kill."""

import json
import os
import re

import numpy as np
import pytest
from PIL import Image

from mmfgm.errors import UsageError
from mmfgm.evaluation.geneval import Verdict, summarize
from mmfgm.evaluation.geneval.folder.layout import (
    Entry,
    VerdictLog,
    encode_png,
    image_name,
    read_image,
    read_results,
    result_row,
    scan_folder,
    write_image,
    write_results,
)
from mmfgm.evaluation.geneval.folder.sheets import draw_sheets
from mmfgm.evaluation.geneval.scorer import Judged
from mmfgm.files import sha256, write_file
from tests.geneval_standin import ROWS

IMAGE = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)


def reference_listing(folder):
    """Image path to metadata, as ``evaluate_images.py`` walks a folder."""
    found = {}
    for subfolder in os.listdir(folder):
        path = os.path.join(folder, subfolder)
        if not os.path.isdir(path) or not subfolder.isdigit():
            continue
        with open(os.path.join(path, 'metadata.jsonl')) as fp:
            metadata = json.load(fp)
        for name in os.listdir(os.path.join(path, 'samples')):
            image = os.path.join(path, 'samples', name)
            if os.path.isfile(image) and re.match(r'\d+\.png', name):
                found[image] = metadata
    return found


def reference_scores(path):
    """Numbers of ``summary_scores.py``."""
    import pandas

    frame = pandas.read_json(path, orient='records', lines=True)
    scores = {tag: task['correct'].mean() for tag, task in frame.groupby('tag', sort=False)}
    return {
        **scores,
        'overall': np.mean(list(scores.values())),
        'images': frame['correct'].mean(),
        'prompts': frame.groupby('metadata')['correct'].any().mean(),
    }


def make(folder, images=4):
    for prompt, row in enumerate(ROWS[:3]):
        for sample in range(images):
            write_image(
                str(folder), Entry(image_name(prompt, sample), row), encode_png(IMAGE + prompt)
            )
    return folder


def judged(correct):
    reason = '' if correct else 'expected cat>=1, found 0'
    return Judged(
        Verdict(correct, reason, {}), {'dog': [[1.5, 2.0, 3.25, 4.0, float(np.float32(0.4))]]}
    )


def test_the_reference_reads_ours(tmp_path):
    folder = make(tmp_path / 'images')
    entries, missing = scan_folder(str(folder))
    listing = reference_listing(folder)
    assert {str(folder / entry.name): entry.row for entry in entries} == listing and not missing
    assert len(listing) == 12 and str(folder / '00002/samples/0003.png') in listing
    for path in listing:
        assert np.array_equal(np.array(Image.open(path)), IMAGE + int(path.split('/')[-3]))

    rows = [result_row(entry, judged(i % 5 < 2)) for i, entry in enumerate(entries)]
    write_results(str(tmp_path), rows, str(folder))
    read = read_results(str(tmp_path / 'results.jsonl'))
    assert [row['filename'] for row in read] == sorted(listing)
    for row in read:
        assert list(row) == [
            'filename',
            'tag',
            'prompt',
            'correct',
            'reason',
            'metadata',
            'details',
        ]
        assert (
            json.loads(row['metadata']) == listing[row['filename']]
            and row['prompt'] == listing[row['filename']]['prompt']
        )
        assert json.loads(row['details']) == {
            'dog': [[1.5, 2.0, 3.25, 4.0, float(np.float32(0.4))]]
        }
    theirs, ours = reference_scores(tmp_path / 'results.jsonl'), summarize(read)
    assert theirs == pytest.approx({name: ours[name] for name in theirs}, rel=1e-12)


def test_we_read_the_references(tmp_path):
    """Its writer names prompts and samples with other widths and puts a grid beside the samples."""
    import pandas

    content = encode_png(IMAGE)
    for name in ('7', '0012', '00100'):
        (tmp_path / name / 'samples').mkdir(parents=True)
        (tmp_path / name / 'metadata.jsonl').write_text(json.dumps(ROWS[0], indent=1) + '\n')
        (tmp_path / name / 'grid.png').write_bytes(b'not looked at')
        for sample in (
            '00000.png',
            '3.png',
            '0002.png',
            '12.pngx',
            'a0001.png',
            '0004.jpg',
            'grid.png',
        ):
            (tmp_path / name / 'samples' / sample).write_bytes(content)
        (tmp_path / name / 'samples' / '0005.png').mkdir()
    (tmp_path / 'notes').mkdir()
    (tmp_path / '5').write_text('a file')
    entries, missing = scan_folder(str(tmp_path))
    assert {str(tmp_path / entry.name): entry.row for entry in entries} == reference_listing(
        tmp_path
    )
    assert len(entries) == 12 and not missing
    rows = [
        dict(result_row(entry, judged(i % 2 == 0)), filename=str(tmp_path / entry.name))
        for i, entry in enumerate(entries)
    ]
    with open(tmp_path / 'theirs.jsonl', 'w') as fp:  # as the reference writes them
        pandas.DataFrame(rows).to_json(fp, orient='records', lines=True)
    assert read_results(str(tmp_path / 'theirs.jsonl')) == rows


@pytest.mark.parametrize(
    'text, message',
    [
        ('{"tag": "single_object",\n "include": [}', 'line 2: expected one JSON object'),
        (json.dumps(ROWS[0]) + '\n' + json.dumps(ROWS[1]), 'line 2: expected one JSON object'),
        ('{"tag": "single_object", "prompt": "x"}', "line 1: 'include' is missing"),
        (
            '{"tag": "colors", "include": [{"class": "cat", "count": 1}]}',
            "line 1: 'prompt' is missing",
        ),
        (
            '{"tag": "t", "prompt": "x", "include": [{"class": "dragon", "count": 1}]}',
            "line 1: 'class' of include.0. must be one",
        ),
        (
            (
                '{"tag": "t", "prompt": "x", "include": [{"class": "cat", "count": 1, "color":'
                ' "teal"}]}'
            ),
            'must be one of red, orange',
        ),
    ],
)
def test_bad_metadata(tmp_path, text, message):
    make(tmp_path)
    (tmp_path / '00001' / 'metadata.jsonl').write_text(text)
    with pytest.raises(UsageError, match=message) as error:
        scan_folder(str(tmp_path))
    assert '00001/metadata.jsonl, line' in str(error.value)


def test_images_that_are_not_there(tmp_path):
    make(tmp_path)
    (tmp_path / '00000' / 'samples' / '0001.png').unlink()
    for sample in range(4):
        (tmp_path / '00002' / 'samples' / f'{sample}'.zfill(4)).with_suffix('.png').unlink()
    entries, missing = scan_folder(str(tmp_path))
    assert [entry.name for entry in missing] == [
        image_name(0, 1),
        *(image_name(2, sample) for sample in range(4)),
    ]
    assert len(entries) == 7 and missing[-1].row == ROWS[2]
    assert scan_folder(str(tmp_path), 0)[1] == []
    (tmp_path / 'empty' / '00000').mkdir(parents=True)
    (tmp_path / 'empty' / '00000' / 'metadata.jsonl').write_text(json.dumps(ROWS[0]))
    assert len(scan_folder(str(tmp_path / 'empty'))[1]) == 4
    with pytest.raises(UsageError, match='hold no images'):
        scan_folder(str(tmp_path / 'empty'), 0)
    with pytest.raises(UsageError, match="00000/samples' has 3 images, expected 2.*--num-samples"):
        scan_folder(str(tmp_path), 2)
    (tmp_path / '00002' / 'metadata.jsonl').unlink()
    with pytest.raises(UsageError, match="00002/metadata.jsonl' cannot be read"):
        scan_folder(str(tmp_path))
    with pytest.raises(UsageError, match='holds no folders named by digits'):
        scan_folder(str(tmp_path / '00000'))
    with pytest.raises(UsageError, match='cannot be read'):
        scan_folder(str(tmp_path / 'nowhere'))


def test_images_are_read_as_the_detector_sees_them(tmp_path):
    turned = Image.fromarray(IMAGE)
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was turned
    turned.save(tmp_path / 'turned.png', exif=exif)
    assert np.array_equal(read_image(str(tmp_path / 'turned.png')), np.rot90(IMAGE, -1))
    Image.fromarray(IMAGE).convert('RGBA').save(tmp_path / 'alpha.png')
    assert np.array_equal(read_image(str(tmp_path / 'alpha.png')), IMAGE)
    Image.fromarray(IMAGE[..., 0]).save(tmp_path / 'gray.png')
    assert np.array_equal(read_image(str(tmp_path / 'gray.png')), np.repeat(IMAGE[..., :1], 3, 2))
    (tmp_path / 'cut.png').write_bytes(encode_png(IMAGE)[:-30])
    (tmp_path / 'text.png').write_text('no image')
    for name in ('cut', 'text', 'nothing'):
        with pytest.raises(UsageError, match=f'{name}.png cannot be read as an image'):
            read_image(str(tmp_path / f'{name}.png'))


def test_bad_results(tmp_path):
    good = json.dumps(dict(result_row(Entry('00000/samples/0000.png', ROWS[0]), judged(True))))
    for text, message in (
        ('', 'has no rows'),
        (good + '\n{"tag": "x"}', 'line 2: lacks filename, prompt'),
        (good + '\n{', 'line 2 is not a JSON object'),
    ):
        (tmp_path / 'results.jsonl').write_text(text)
        with pytest.raises(UsageError, match=message):
            read_results(str(tmp_path / 'results.jsonl'))
    with pytest.raises(UsageError, match='cannot be read'):
        read_results(str(tmp_path / 'nothing.jsonl'))


def test_a_verdict_holds_for_one_image_one_prompt_one_judge(tmp_path):
    folder = str(make(tmp_path))
    entries, _ = scan_folder(folder)
    rows = [result_row(entry, judged(True)) for entry in entries]
    digests = [sha256(os.path.join(folder, entry.name)) for entry in entries]
    identity = dict(detector='a', options={})
    # two processes wrote them, and one was killed in the middle of a line
    VerdictLog(folder, identity, 0).append(rows[:6], digests[:6])
    VerdictLog(folder, identity, 1).append(rows[6:], digests[6:])
    path = tmp_path / 'verdicts' / '00001.jsonl'
    path.write_text(path.read_text()[:-40])
    log = VerdictLog(folder, identity, 1)
    assert log.read(folder, entries) == {row['filename']: row for row in rows[:-1]}
    log.append(rows[-1:], digests[-1:])
    assert log.read(folder, entries) == {row['filename']: row for row in rows}
    assert VerdictLog(folder, dict(detector='b', options={})).read(folder, entries) == {}
    # another image, another prompt, no image
    write_image(folder, entries[0], encode_png(IMAGE + 100))
    (tmp_path / entries[1].name).unlink()
    changed = [*entries[:2], Entry(entries[2].name, ROWS[3]), *entries[3:]]
    assert sorted(log.read(folder, changed)) == [entry.name for entry in entries[3:]]
    log.append([dict(rows[0], correct=False)], [sha256(os.path.join(folder, entries[0].name))])
    assert log.read(folder, entries)[entries[0].name]['correct'] is False


def test_several_processes_write_one_file(tmp_path, monkeypatch):
    """Of several machines, where their numbers may be equal: here the second writes while the first
    is about to finish."""
    finish = os.replace

    def finish_second(unfinished, filename):
        monkeypatch.setattr(os, 'replace', finish)
        write_file(filename, b'same')
        finish(unfinished, filename)

    monkeypatch.setattr(os, 'replace', finish_second)
    write_file(str(tmp_path / 'metadata.jsonl'), b'same')
    assert [path.name for path in tmp_path.iterdir()] == ['metadata.jsonl']
    assert (tmp_path / 'metadata.jsonl').read_bytes() == b'same'


def test_sheets(tmp_path):
    folder = str(make(tmp_path))
    entries, _ = scan_folder(folder)
    rows = [result_row(entry, judged(i % 2 == 0)) for i, entry in enumerate(entries)]
    rows.append(result_row(Entry(image_name(2, 9), ROWS[2]), reason='no image: missing'))
    sheets = draw_sheets(rows, folder)
    assert sheets.keys() == {'single_object', 'two_object', 'counting'}
    heights = {tag: sheet.shape[0] for tag, sheet in sheets.items()}
    assert (
        len(set(heights.values())) == 1
        and sheets['counting'].shape[1] > sheets['two_object'].shape[1]
    )
    # frames of both verdicts, and the image's own pixels
    colors = {tuple(color) for color in sheets['single_object'].reshape(-1, 3).tolist()}
    assert {(24, 128, 56), (192, 32, 32), tuple(IMAGE[3, 4].tolist())} <= colors
    many = [
        dict(row, tag='t', metadata=json.dumps(dict(include=[], i=i)), filename=image_name(i, 0))
        for i, row in enumerate(rows)
    ]
    assert draw_sheets(many, folder, 3)['t'].shape[0] == 3 * heights['counting']
    assert draw_sheets(rows, folder, 0) == {}
