"""A kernel from the left against a kernel from the right, by rows.

    python -m benchmarks.products

Each figure is of one product of `rrt.ops.matmul.matmul` with a kernel as
training holds it and with a `TransposedKernel` one, as decoding does; two dozen kernels
in turn, so that they come from memory as a model's do. Decoding has none on
cores with AVX-512 and no AMX (`matmul.prefers_transposed`).
"""

from absl import flags
import jax

from benchmarks import common
from rrt import command, console, runtime
from rrt.ops import matmul

FLAGS = flags.FLAGS
flags.DEFINE_string('dtype', 'float32', 'Precision of both.')
flags.DEFINE_list('rows', ['1', '3', '8', '16', '32', '64', '128'], 'Rows of x.')
flags.DEFINE_integer('repeats', 9, 'Timed runs of each.')
flags.DEFINE_string('out', 'benchmarks/results/products.json', 'JSON file.')
_SHAPES = ((576, 1536), (1536, 576), (576, 192))  # Of SmolLM2-135M.
_KERNELS = 24


def main(_):
  runtime.use_huge_pages()
  keys = jax.random.split(jax.random.key(0), _KERNELS)
  figures: dict = {'machine': common.machine(2), 'dtype': FLAGS.dtype}
  table = []
  for shape in _SHAPES:
    kernels = [jax.random.normal(k, shape).astype(FLAGS.dtype) for k in keys]
    forms = {'right': kernels, 'left': [matmul.TransposedKernel(k.T) for k in kernels]}
    for rows in map(int, FLAGS.rows):
      x = jax.random.normal(keys[0], (rows, 1, shape[0])).astype(FLAGS.dtype)
      product = jax.jit(lambda x, ks: [matmul.matmul(x, k) for k in ks])
      seconds = common.take_turns(
        {
          name: lambda ks=ks, x=x, f=product: jax.block_until_ready(f(x, ks))
          for name, ks in forms.items()
        },
        FLAGS.repeats,
      )
      micros = {
        name: 1e6 * common.summary(s, 1)['seconds'] / _KERNELS for name, s in seconds.items()
      }
      micros['ratio'] = micros['left'] / micros['right']
      name = f'{shape[0]} x {shape[1]}'
      figures[f'{name}, {rows} rows'] = micros
      table.append((name, rows, *micros.values()))
  console.table(table, ('kernel', 'rows', 'right, us', 'left, us', 'left / right'))
  common.save(FLAGS.out, figures)
  console.finish(figures)


if __name__ == '__main__':
  command.run(main)
