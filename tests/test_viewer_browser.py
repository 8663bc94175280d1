"""The viewer in a real Chromium: the widgets in JupyterLab under a user's hand, the pages in light and dark."""

import nbformat
import pytest
from browser import CHROMIUM, chromium, jupyter_lab, wait_for
from test_viewer import QUESTION, build, group_of, mixed

from searchr1_lib.files import TrajectoryLog
from searchr1_lib.study.viewer import colors, render_comparison, render_html

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")

EVIL = [
    '<think> $x^2$ \\(y\\) <img src=x onerror="window.forged=1"> </think><script>window.forged=1</script>',
    "</div></style><answer> <b id=forged>Taimbford</b>\u202e </answer>",
]

#: Contrast of every text with what lies behind it (WCAG 2.2), as [ratio, text]; translucent backgrounds are blended.
CONTRASTS = """(() => {
  const parse = c => (c.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
  const over = (top, under) => [0, 1, 2].map(i => top[i] * (top[3] ?? 1) + under[i] * (1 - (top[3] ?? 1)));
  const behind = e => e ? over(parse(getComputedStyle(e).backgroundColor), behind(e.parentElement)) : [255, 255, 255];
  const light = c => c.map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
                      .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const texts = document.createTreeWalker(document.querySelector('.sr1'), NodeFilter.SHOW_TEXT);
  const found = [];
  while (texts.nextNode()) {
    const e = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || e.closest('style')) continue;
    const [a, b] = [light(over(parse(getComputedStyle(e).color), behind(e))), light(behind(e))];
    found.push([(Math.max(a, b) + .05) / (Math.min(a, b) + .05), texts.currentNode.data]);
  }
  return found.sort((a, b) => a[0] - b[0]);
})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_word_can_be_read_in_light_and_dark(page, tmp_path, theme):
    group = group_of()
    drawn = [render_html(group, color=color) for color in colors(group)] + [render_comparison(group, group[::-1])]
    for number, html in enumerate(drawn):
        (tmp_path / f"{number}.html").write_text(html, encoding="utf-8")
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])
        page.open(f"file://{tmp_path / f'{number}.html'}")
        wait_for(
            lambda number=number: page.js(
                f"location.href.endsWith('/{number}.html') && document.readyState === 'complete'"
            )
        )
        contrasts = page.js(CONTRASTS)
        assert len(contrasts) > 20 and contrasts[0][0] >= 4.5, contrasts[:3]  # WCAG level AA


def test_the_widgets_obey_a_user_in_jupyterlab_and_nothing_written_by_others_does(page, tmp_path):
    evil = build(QUESTION, EVIL, reward=0.0, group="evil", step=9)
    TrajectoryLog(tmp_path / "before.jsonl").append([*mixed(), evil])
    TrajectoryLog(tmp_path / "after.jsonl").append(mixed()[::-1])
    cells = [
        "from searchr1_lib import TrajectoryLog\nfrom searchr1_lib.study import viewer\n"
        "before, after = TrajectoryLog('before.jsonl').read(), TrajectoryLog('after.jsonl').read()\n"
        "viewer.browse(before)",
        "viewer.compare(before, after)",
    ]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source) for source in cells], metadata={"kernelspec": kernel}
    )
    nbformat.write(notebook, tmp_path / "w.ipynb")
    with jupyter_lab(tmp_path) as address:
        page.open(address("lab/tree/w.ipynb"))
        session = "[...window.jupyterapp?.shell.widgets('main') ?? []][0]?.sessionContext?.session"
        wait_for(lambda: page.js(f"{session}?.kernel?.status") == "idle")
        page.js("void jupyterapp.commands.execute('notebook:run-all-cells')")
        wait_for(lambda: page.js("document.querySelectorAll('.jp-OutputArea .widget-select').length") == 2)
        page.js("""window.cell = n => document.querySelectorAll('.jp-Notebook .jp-CodeCell')[n];
                   window.control = (n, label) => [...cell(n).querySelectorAll('.jupyter-widgets')].find(w =>
                       w.querySelector(':scope > .widget-label')?.textContent == label)
                       .querySelector('select, input');
                   window.choose = (n, label, text) => { const c = control(n, label);
                       c.selectedIndex = [...c.options].findIndex(o => o.text.replace(/\\s/g, ' ') == text);
                       c.dispatchEvent(new Event('change', {bubbles: true})); }; true""")

        def shows(cell, text):
            wait_for(lambda: page.js(f"cell({cell}).querySelector('.jp-OutputArea').innerText.includes({text!r})"))

        shows(0, "7 of 7 trajectories")
        chosen = page.js("[...cell(0).querySelectorAll('.widget-dropdown select')].map(c => c.selectedOptions[0].text)")
        assert [text.replace("\xa0", " ") for text in chosen] == ["any"] * 5 + ["as logged", "mask"]
        page.js("choose(0, 'knowledge', 'known')")
        shows(0, "2 of 7 trajectories")
        shows(0, "What was the trade of Ada Sorn?")
        page.js("choose(0, 'knowledge', 'any')")
        page.js("choose(0, 'colour', 'logprob')")
        shows(0, "probability of the sampled token")
        page.js("control(0, 'text').focus()")
        page.type("onerror")
        shows(0, "1 of 7 trajectories")
        shows(0, "<script>window.forged=1</script>")  # as text
        shows(1, "1 fixed")  # two of five were right, now two of four
        shows(1, "before #5")
        page.js("choose(1, 'outcome', 'same, right (1)')")
        shows(1, "What was the trade of Ada Sorn?")
        forged = "window.forged || document.querySelectorAll('#forged, .sr1 :is(mjx-container, img, script)').length"
        assert page.js(forged) == 0
