"""The page, in a real browser: type, watch, turn, stop."""

import shutil

import pytest

from rrt.infer import generate
from rrt.infer.engine.engine import Engine
from tests import runs

pytest.importorskip('uvicorn')
pytest.importorskip('selenium')

from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

from rrt.server.app import Limits, Server
from rrt.server.worker import Worker
from tests.serving import serving

CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
DRIVER = shutil.which('chromedriver')
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason='needs chromium and chromedriver')


@pytest.fixture(scope='module')
def address():
  """A server with a gate and the lossless mode, on a port of its own."""
  model = runs.child()
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
  driver.implicitly_wait(5)
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


def write(browser):
  """Clicks, waits for the end, and gives the text and each token's loops."""
  at(browser, 'go').click()
  wait_for(browser, lambda b: at(b, 'go').is_enabled())
  assert at(browser, 'error').text == ''
  spans = browser.find_elements('css selector', '#text span')
  text = ''.join(s.get_property('textContent') for s in spans)
  loops = [s.get_attribute('title') for s in spans[1:]]
  colours = {s.value_of_css_property('background-color') for s in spans[1:]}
  return text, loops, colours


@pytest.mark.slow
def test_the_page_writes_coloured_tokens(browser, address):
  browser.get(address)
  wait_for(browser, lambda b: at(b, 'name').text == 'tiny')
  legend = browser.find_elements('css selector', '.swatch')
  assert [s.text for s in legend] == ['1 loop', '2 loops']
  assert at(browser, 'gate').is_displayed()
  fill(browser, 'prompt', 'The sea')
  fill(browser, 'tokens', 12)
  want = generate.complete(runs.child(), 'The sea', max_new_tokens=12)[0]

  # The lossless mode is on at first: full depth, whatever the slider says.
  assert at(browser, 'lossless').is_selected()
  assert not at(browser, 'threshold').is_enabled()
  exact, loops, colours = write(browser)
  assert exact == 'The sea' + want.text
  assert set(loops) == {'2 loops'} and len(colours) == 1
  assert 'tokens/s' in at(browser, 'figures').text
  assert '2.00 loops a token' in at(browser, 'figures').text

  # Off, and with a threshold that all reach: one loop a token.
  at(browser, 'lossless').click()
  fill(browser, 'threshold', 0)
  early, loops, other = write(browser)
  assert set(loops) == {'1 loop'} and other.isdisjoint(colours)
  assert early != exact
  assert '1.00 loops a token' in at(browser, 'figures').text


def test_the_page_stops_and_says_what_is_wrong(browser, address):
  browser.get(address)
  wait_for(browser, lambda b: at(b, 'name').text == 'tiny')
  fill(browser, 'prompt', 'The sea')
  fill(browser, 'tokens', 12)
  # Both in one turn of the browser's loop: before an answer can come.
  assert not at(browser, 'stop').is_enabled()
  browser.execute_script('for (const id of ["go", "stop"]) document.getElementById(id).click();')
  wait_for(browser, lambda b: at(b, 'go').is_enabled())
  assert not at(browser, 'stop').is_enabled()
  assert at(browser, 'text').text == 'The sea'
  assert at(browser, 'error').text == ''
  _, loops, _ = write(browser)
  assert len(loops) > 0
  fill(browser, 'tokens', 10**6)
  at(browser, 'go').click()
  wait_for(browser, lambda b: 'max_tokens' in at(b, 'error').text)
  assert at(browser, 'go').is_enabled()
