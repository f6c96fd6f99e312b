"""The page, in a real browser: type, watch, turn, stop."""

import dataclasses
import shutil

import pytest

from rrt.data.tokenizer import Tokenizer
from rrt.infer import generate
from rrt.infer.engine.engine import Engine
from tests import runs

pytest.importorskip('uvicorn')
pytest.importorskip('selenium')

from selenium import webdriver
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from rrt.server.app import Limits, Server
from rrt.server.worker import Worker
from tests.serving import serving

CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
DRIVER = shutil.which('chromedriver')
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason='needs chromium and chromedriver')


TEMPLATE = (
  "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}"
  '{% if add_generation_prompt %}a:{% endif %}'
)


@pytest.fixture(scope='module')
def model():
  """The child, with a chat template of its own."""
  child = runs.child()
  core = child.tokenizer._core
  tokenizer = Tokenizer(core, eos_ids=[0], bos_id=0, chat_template=TEMPLATE)
  config = dataclasses.replace(child.config, max_context=512)
  return dataclasses.replace(child, config=config, tokenizer=tokenizer)


@pytest.fixture(scope='module')
def address(model):
  """A server with a gate and the lossless mode, on a port of its own."""
  engine = Engine(
    model, slots=2, page=8, steps=2, lossless=True, gate='change', threshold=2, kv='write_ahead'
  )
  worker = Worker(engine, model.tokenizer, max_waiting=3)
  app = Server(worker, model.tokenizer, 'tiny', Limits(4000, max_tokens=40)).app()
  with serving(app) as (host, port):
    yield f'http://{host}:{port}/'


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
  options = webdriver.ChromeOptions()
  options.binary_location = CHROMIUM
  for flag in (
    'headless=new',
    'no-sandbox',
    'disable-gpu',
    'no-first-run',
    'disable-background-networking',
    'disable-component-update',
    'disable-sync',
    f'user-data-dir={tmp_path_factory.mktemp("profile")}',
  ):
    options.add_argument(f'--{flag}')
  service = webdriver.ChromeService(executable_path=DRIVER)
  driver = webdriver.Chrome(options=options, service=service)
  yield driver
  driver.quit()


def at(browser, name):
  return browser.find_element('id', name)


def wait_for(browser, ready):
  return WebDriverWait(browser, 60).until(ready)


def fill(browser, name, value):
  browser.execute_script(
    'const e = document.getElementById(arguments[0]);'
    'e.value = arguments[1]; e.dispatchEvent(new Event("input"));',
    name,
    value,
  )


def open_page(browser, address, chat: bool, width: int = 1280):
  """A fresh page: nothing kept from before."""
  browser.set_window_size(width, 900)
  # Chromium's windows have a least width; the emulated screen has none.
  screen = {'width': width, 'height': 900, 'deviceScaleFactor': 1, 'mobile': False}
  browser.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', screen)
  browser.get(address)
  browser.execute_script('localStorage.clear();')
  reload(browser)
  if at(browser, 'chat').is_selected() != chat:
    at(browser, 'chat').click()
  fill(browser, 'tokens', 12)


def reload(browser):
  browser.refresh()
  wait_for(browser, lambda b: at(b, 'name').text == 'tiny')


def finish(browser, error: str = ''):
  wait_for(browser, lambda b: at(b, 'go').is_enabled())
  assert error in at(browser, 'error').text and bool(error) == bool(at(browser, 'error').text)


def articles(browser):
  """(question, [(text, loops of its tokens, colours)]) of each turn."""
  found = []
  for article in browser.find_elements('css selector', 'article'):
    asked = article.find_elements('css selector', '.asked')
    answers = []
    for box in article.find_elements('css selector', '.answer'):
      text = box.find_element('css selector', '.said').get_property('textContent')
      spans = box.find_elements('css selector', '.said span[title]')
      loops = [s.get_attribute('title') for s in spans]
      colours = {s.value_of_css_property('background-color') for s in spans}
      answers.append((text, loops, colours))
    found.append((asked[0].text if asked else '', answers))
  return found


def write(browser):
  """Clicks, waits for the end, and gives the last answer."""
  at(browser, 'go').click()
  finish(browser)
  return articles(browser)[-1][1][0]


@pytest.mark.slow
def test_the_page_writes_coloured_tokens(browser, address, model):
  open_page(browser, address, chat=False)
  legend = browser.find_elements('css selector', '.swatch')
  assert [s.text for s in legend] == ['1 loop', '2 loops']
  assert at(browser, 'gate').is_displayed()
  fill(browser, 'prompt', 'The sea')
  want = generate.complete(model, 'The sea', max_new_tokens=12)[0]

  # The lossless mode is on at first: full depth, whatever the slider says.
  assert at(browser, 'lossless').is_selected()
  assert not at(browser, 'threshold').is_enabled()
  exact, loops, colours = write(browser)
  assert exact == 'The sea' + want.text
  assert set(loops) == {'2 loops'} and len(colours) == 1
  figures = browser.find_element('css selector', '.figures').text
  assert 'tokens/s' in figures and '2.00 loops a token' in figures

  # Off, and with a threshold that all reach: one loop a token.
  at(browser, 'lossless').click()
  fill(browser, 'threshold', 0)
  early, loops, other = write(browser)
  assert set(loops) == {'1 loop'} and other.isdisjoint(colours)
  assert early != exact

  # Both beside each other, with a bar for each token's loops.
  at(browser, 'compare').click()
  at(browser, 'go').click()
  finish(browser)
  _, answers = articles(browser)[-1]
  assert [a[0] for a in answers] == [early, exact]
  heads = browser.find_elements('css selector', 'article:last-child h2')
  assert [h.text for h in heads] == ['with exits', 'full depth']
  charts = browser.find_elements('css selector', 'article:last-child svg')
  heights = [
    [r.get_attribute('height') for r in c.find_elements('css selector', 'rect')] for c in charts
  ]
  assert heights == [['1'] * 12, ['2'] * 12]
  assert charts[0].get_attribute('aria-label') == 'Loops by position, 1.00 of 2 on average'
  left, right = browser.find_elements('css selector', 'article:last-child .answer')
  assert left.rect['y'] == right.rect['y'] and left.rect['x'] < right.rect['x']


def test_a_conversation_is_kept_and_sent(browser, address, model):
  open_page(browser, address, chat=True)
  prompt = at(browser, 'prompt')
  prompt.send_keys('Hi', Keys.SHIFT, Keys.ENTER, Keys.NULL, 'you')
  assert prompt.get_property('value') == 'Hi\nyou' and not articles(browser)
  prompt.send_keys(Keys.ENTER)
  finish(browser)
  assert prompt.get_property('value') == ''
  prompt.send_keys('And?', Keys.ENTER)
  finish(browser)
  (one, [(first, *_)]), (two, [(second, *_)]) = articles(browser)
  assert (one, two) == ('Hi\nyou', 'And?')
  tell = lambda text: generate.complete(model, text, max_new_tokens=12)[0].text
  assert first == tell('u:Hi\nyou\na:')
  assert second == tell(f'u:Hi\nyou\na:{first}\nu:And?\na:')

  # Both turns and what is being typed survive a reload; the next message knows them.
  prompt.send_keys('draft')
  before = articles(browser)
  reload(browser)
  assert articles(browser) == before
  assert at(browser, 'prompt').get_property('value') == 'draft'
  assert at(browser, 'tokens').get_property('value') == '12'
  at(browser, 'new').click()
  assert not articles(browser)
  reload(browser)
  assert not articles(browser)


def test_an_empty_answer_is_explained(browser, address, model):
  open_page(browser, address, chat=True)
  first = generate.complete(model, 'u:Hi\na:', max_new_tokens=1)[0].text
  assert first
  browser.execute_script(
    'const real = window.fetch, stop = [arguments[0]]; window.fetch = (url, options) => '
    'real(url, {...options, body: JSON.stringify({...JSON.parse(options.body), stop})});',
    first,
  )
  at(browser, 'prompt').send_keys('Hi', Keys.ENTER)
  finish(browser)
  assert 'The answer is empty' in browser.find_element('css selector', '.remark').text


def test_the_page_stops_and_says_what_is_wrong(browser, address):
  open_page(browser, address, chat=False)
  fill(browser, 'prompt', 'The sea')
  # Both in one turn of the browser's loop: before an answer can come.
  assert not at(browser, 'stop').is_enabled()
  browser.execute_script('for (const id of ["go", "stop"]) document.getElementById(id).click();')
  finish(browser)
  assert not at(browser, 'stop').is_enabled()
  assert browser.find_element('css selector', '.said').text == 'The sea'
  assert browser.find_element('css selector', '.remark').text == 'Stopped.'
  _, loops, _ = write(browser)
  assert len(loops) > 0
  count = len(articles(browser))
  fill(browser, 'tokens', 10**6)
  at(browser, 'go').click()
  finish(browser, error='max_tokens')
  assert len(articles(browser)) == count
  assert at(browser, 'prompt').get_property('value') == 'The sea'  # Nothing typed is lost.


@pytest.mark.parametrize('width', [1280, 390, 320])
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_every_width_and_colour_scheme(browser, address, width, scheme):
  media = {'features': [{'name': 'prefers-color-scheme', 'value': scheme}]}
  browser.execute_cdp_cmd('Emulation.setEmulatedMedia', media)
  open_page(browser, address, chat=True, width=width)
  at(browser, 'lossless').click()
  at(browser, 'compare').click()
  at(browser, 'prompt').send_keys('W' * 60, Keys.ENTER)
  finish(browser)
  size = browser.execute_script(
    'const e = document.documentElement; return [e.scrollWidth, e.clientWidth, window.innerWidth];'
  )
  assert size[0] <= size[1] and size[2] == width
  left, right = browser.find_elements('css selector', '.answer')
  assert (left.rect['y'] == right.rect['y']) == (width > 600)  # Below each other on a phone.
  ratios = browser.execute_script(CONTRAST)
  assert ratios and min(ratios) >= 4.5
  # Everything that can be set or seen to change has a name.
  for element in browser.find_elements('css selector', 'input, textarea, button'):
    if element.is_displayed():
      assert element.accessible_name
  assert at(browser, 'turns').get_attribute('aria-live') == 'polite'
  browser.execute_cdp_cmd('Emulation.setEmulatedMedia', {'features': []})


# Contrast of text and background by WCAG 2, of all texts that are seen.
CONTRAST = """
const light = c => {
  const [r, g, b] = c.match(/[\\d.]+/g).map(Number).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const back = e => {
  for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor;
    if (!/, 0\\)$/.test(c)) return c;
  }
};
return [...document.querySelectorAll('h1, p, .asked, .said span, label, legend, button:enabled')]
  .filter(e => e.offsetParent && e.textContent.trim()).map(e => {
    const [a, b] = [light(getComputedStyle(e).color), light(back(e))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  });
"""
