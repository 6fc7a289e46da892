"""A chapter in JupyterLab as a reader uses it: open it, run all cells, move the slider, see the figure change. Headless Chromium, driven by Playwright."""
import importlib.util, json, os, secrets, shutil, socket, subprocess, sys, time
import urllib.request

import pytest

from tools import ROOT, Notebook, copy_of_repo, environment

CHROMIUM = next(filter(None, [os.environ.get('VITBOOK_CHROMIUM'), *map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))]), None)
NOTEBOOK = os.environ.get('VITBOOK_LAB_NOTEBOOK', 'nbs/01_dynamics/02_scan_and_snap.ipynb')
MISSING = ("no Chromium on PATH (Debian: apt install chromium; or name one in VITBOOK_CHROMIUM)" if not CHROMIUM else
           'playwright is not installed: pip install "vitbook[dev]"' if not importlib.util.find_spec('playwright') else
           'jupyterlab is not installed: pip install "vitbook[book]"' if not importlib.util.find_spec('jupyterlab') else '')
pytestmark = [pytest.mark.lab, pytest.mark.skipif(bool(MISSING), reason=MISSING)]
ARGUMENTS = ['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--no-first-run', '--disable-quic', '--disable-dev-shm-usage']


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "JupyterLab on a copy of the repository, with settings of its own; its address and token."
    base = tmp_path_factory.mktemp('lab')
    copy = copy_of_repo(base/'repo')
    path = copy/NOTEBOOK
    book = json.loads(path.read_text(encoding='utf-8'))
    for cell in book['cells']:                                          # slow cells too: the first cell has them leave themselves out
        if cell['cell_type'] == 'code': cell['outputs'], cell['execution_count'] = [], None
    path.write_text(json.dumps(book), encoding='utf-8')
    config = base/'config'/'labconfig'
    config.mkdir(parents=True)
    (config/'page_config.json').write_text(json.dumps({'disabledExtensions': {'@jupyterlab/apputils-extension:announcements': True}}))   # it asks a question first
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    token = secrets.token_hex(16)
    folders = {f'JUPYTER_{name}_DIR': str(base/name.lower()) for name in ('CONFIG', 'DATA', 'RUNTIME')} | {'IPYTHONDIR': str(base/'ipython')}
    folders |= {'JUPYTERLAB_SETTINGS_DIR': str(base/'settings'), 'JUPYTERLAB_WORKSPACES_DIR': str(base/'workspaces')}
    log = open(base/'lab.log', 'w+')
    server = subprocess.Popen([sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}', '--ServerApp.port_retries=0',
                               f'--IdentityProvider.token={token}', f'--ServerApp.root_dir={copy}', '--expose-app-in-browser'],
                              cwd=copy, env=environment(**folders, PYTHONPATH=os.pathsep.join([str(copy), str(ROOT/'tests'/'offline')])), stdout=log, stderr=subprocess.STDOUT)
    address = f'http://127.0.0.1:{port}'
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f'{address}/api?token={token}', timeout=2)
                break
            except OSError:
                if server.poll() is not None: break
                time.sleep(.25)
        else: raise AssertionError('JupyterLab does not answer\n' + (base/'lab.log').read_text()[-3000:])
        assert server.poll() is None, (base/'lab.log').read_text()[-3000:]
        yield address, token
    finally:
        server.terminate()
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()
        log.close()


STATE = '''() => {
    const panel = window.jupyterapp.shell.currentWidget, cells = panel?.content?.model?.cells;
    if (!cells?.length) return null;
    const found = {status: panel.sessionContext.session?.kernel?.status, code: 0, ran: 0, errors: [], controls: []};
    for (let i = 0; i < cells.length; i++) {
        const cell = cells.get(i);
        if (cell.type !== 'code' || !cell.sharedModel.getSource().trim()) continue;
        found.code++;
        if (cell.executionCount !== null) found.ran++;
        for (const output of cell.outputs.toJSON()) {
            if (output.output_type === 'error') found.errors.push(`cell ${i}: ${output.ename}: ${output.evalue}`);
            const view = output.data?.['application/vnd.jupyter.widget-view+json'];            // a progress bar is a widget too
            if (view && cell.sharedModel.getSource().includes('see.slider(')) found.controls.push(i);
        }
    }
    return found;
}'''


def wait(ask, seconds, what):
    "The first true answer of `ask`; an AssertionError after so many seconds."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := ask(): return found
        time.sleep(.25)
    raise AssertionError(f'after {seconds} s: {what}')


def test_run_all_and_move_the_slider(lab, tmp_path):
    from playwright.sync_api import sync_playwright
    address, token = lab
    said, elsewhere = [], []
    with sync_playwright() as play:
        browser = play.chromium.launch_persistent_context(str(tmp_path/'profile'), executable_path=CHROMIUM, headless=True, args=ARGUMENTS, viewport=dict(width=1400, height=1000))
        try:
            page = browser.pages[0] if browser.pages else browser.new_page()
            page.on('console', lambda message: said.append(message.text) if message.type == 'error' else None)
            page.on('pageerror', lambda error: said.append(str(error)))
            page.on('request', lambda request: elsewhere.append(request.url) if request.url.startswith('http') and not request.url.startswith(address) else None)
            page.goto(f'{address}/lab/tree/{NOTEBOOK}?token={token}', wait_until='domcontentloaded')
            state = lambda: page.evaluate(STATE)
            wait(lambda: page.evaluate('() => !!window.jupyterapp') and (found := state()) and found['status'] == 'idle', 120, 'the notebook is not open with a kernel')
            page.get_by_role('menuitem', name='Run', exact=True).click()
            page.get_by_text('Run All Cells', exact=True).click()
            try: wait(lambda: (found := state())['errors'] or (found['ran'] == found['code'] and found['status'] == 'idle'), 300, 'the cells have not all run')
            finally: page.screenshot(path=tmp_path/'ran.png')
            assert not state()['errors'], state()['errors']
            controls = state()['controls']
            assert controls, 'no control was shown'

            page.evaluate('async at => { const book = window.jupyterapp.shell.currentWidget.content; book.activeCellIndex = at; await book.scrollToItem(at, "start"); }', controls[0])
            cell = page.locator(f'.jp-Cell[data-windowed-list-index="{controls[0]}"]')
            handle, figure = cell.locator('.noUi-handle').first, cell.locator('.jp-OutputArea img').last
            handle.wait_for(timeout=30_000)
            figure.wait_for(timeout=30_000)
            before = figure.get_attribute('src')
            page.screenshot(path=tmp_path/'before.png')
            box, track = handle.bounding_box(), cell.locator('.noUi-target').first.bounding_box()
            middle = box['x'] + box['width'] / 2
            left, right = middle - track['x'], track['x'] + track['width'] - middle
            goal = middle + (right * .6 if right > left else -left * .6)          # towards the farther end
            page.mouse.move(middle, box['y'] + box['height'] / 2)
            page.mouse.down()
            page.mouse.move(goal, box['y'] + box['height'] / 2, steps=6)
            page.mouse.up()
            wait(lambda: figure.count() and figure.get_attribute('src') not in (None, before), 60, 'the slider was moved and the figure is still the same')
            wait(lambda: state()['status'] == 'idle', 30, 'the kernel is busy')
            page.screenshot(path=tmp_path/'after.png')
            assert figure.get_attribute('src').startswith('data:image/png') and figure.evaluate('image => image.naturalWidth') > 100, 'the new figure is a picture'
            assert not page.get_by_text('Error displaying widget').count() and not page.get_by_text('Loading widget').count()
            print(f'pictures of the page: {tmp_path}')
        finally: browser.close()
    broken = [text for text in said if any(word in text.lower() for word in ('widget', 'failed to load model', 'module not found', 'cannot find module'))]
    assert not broken, broken
    assert not elsewhere, f'the page asked other hosts: {elsewhere[:5]}'


def test_the_chapter_has_a_control():
    "Without a browser: the test above needs a slider to move."
    assert 'see.slider(' in Notebook(ROOT/NOTEBOOK).program
