r"""SmolLM2-135M, 8 + 7 x 2 + 8, rank 64: both loops learn to be read.

A stage after `smollm2_8_7x2_8.py`, from the model that it left.

COMMAND
  python -m rrt.train --config=experiments/smollm2_8_7x2_8_exits.py \
      --config.child=runs/smollm2_8_7x2_8/model \
      --workdir=runs/smollm2_8_7x2_8_exits

HARDWARE
  Two CPU cores, 10 GiB (remat "none"); or one GPU or TPU chip.

RESULT
  Two cores of an AMD EPYC, 24 steps of 1,024 tokens, 13 s each, on news
  (--config.data.path), --config.remat=none, --config.seed=1. Nats on 8,192
  tokens of other news in rows of 1,024, when all tokens leave after that loop:

                                      loop 1   loop 2
    before                             5.143    3.659
    weight 0.3 (this file)             4.294    3.675
    weight 1.0                         4.259    3.709
    weight 0.3, distillation alone     4.366    3.674

  Other ways to spend the LoRA do not mend loop 1. Nats at loop 1 and loop 2, of
  a conversion on 4,096 tokens, then after 12 steps of 512 tokens of this recipe
  (rrt convert --calibration_tokens=4096; --config.steps=12 --config.batch=1):

                                          converted         after 12 steps
    rank 64 in both loops (--rank=64)     5.606   4.134     4.707   3.959
    loop 1 without LoRA (--rank=0/128)    5.585   4.121     4.736   3.949
    more for loop 1 (--rank=96/32)        5.611   4.136     4.696   3.962
    norms shared (--noloop_norms)         5.599   4.166     4.695   3.983

  What one loop gains by them the other loses, some hundredths of a nat; so short
  a training does not show the paper's gap between a loop 1 with and without LoRA.

  A lens, by least squares on 16,384 tokens of news, on rows of 512 (full depth
  3.718): loop 1 goes from 4.323 to 4.140 nats, and its most likely token is
  that of full depth for 65 % of the tokens instead of 56 %.
  Tuning the lens after that (--lens_epochs=4 --max_tokens=65536) gains nothing:
  at --loss=0.037 the gate still runs 1.85 loops a token.

  With `rrt fit-gate --loss=0.037 --context=512 --max_tokens=32768` on news
  (threshold 0.851), measured by `rrt evaluate --exits=learned,oracle
  --kv=write_ahead,propagate,exact_fill --context=512 --max_tokens=8192` on
  others (full depth 3.601). Nats lost, and share of tokens that are as at full
  depth, by what the skipped loop keeps of a token:

    mean loops     write_ahead     propagate       exact_fill
    1.90           0.437   64 %    0.013   94 %    0.006   97 %
    1.86 (gate)    0.492   62 %    0.021   92 %    0.012   95 %
    1.75           0.493   61 %    0.046   89 %    0.031   92 %
    1.50           0.458   62 %    0.123   80 %    0.097   83 %
    1.25           0.399   64 %    0.224   73 %    0.193   75 %
    1.10           0.368   66 %    0.294   69 %    0.272   70 %
    1.34 (oracle)  0.445   72 %    0.186   86 %    0.157   91 %

  The oracle's rows let the first token of a row leave, which since then stays.

  The gates beside each other, the whole recipe run again with jax 0.12
  (threshold 0.851; propagate, full depth 3.718 on the first 8,192 tokens of
  others; --exits=all; benchmarks/results/exits_8_7x2_8_gates.svg). Nats lost,
  and share of tokens that are as at full depth:

    mean loops     learned         change          margin          entropy
    1.90           0.014   94 %    0.073   92 %    0.026   96 %    0.022   96 %
    1.75           0.054   88 %    0.147   84 %    0.085   90 %    0.069   89 %
    1.50           0.135   79 %    0.241   77 %    0.194   83 %    0.183   79 %
    1.25           0.246   72 %    0.331   70 %    0.308   74 %    0.297   72 %
    1.10           0.343   67 %    0.384   67 %    0.375   69 %    0.378   67 %

  The stored threshold: 1.86 loops, 0.026 nats (0.7 % of the loss), 92 %. The
  oracle, the first loop that agrees: 1.36 loops, 0.211 nats, 86 %. Margin and
  entropy read the whole head after every loop, which costs more than a loop.

  The gate learns exp(-KL). One that learned whether the most likely token
  agrees, with a lens fitted on half as much text, lost 0.020, 0.081 and 0.192
  at 1.90, 1.75 and 1.50 loops (propagate, other news). With as much text to
  fit on, judged token by token on 16,384 tokens, 22 % of the tokens may leave
  by that one for 1 % of the loss and 27 % by this one.

  Copying the keys and values of loop 1 into loop 2 (write_ahead) spoils the
  model as soon as a few tokens leave: with norms and LoRA of their own the two
  loops do not share a basis. The oracle's exits are not free either, although
  each changes no token by itself: the coda keeps what left early.
"""

from experiments import smollm2_8_7x2_8


def get_config(arg: str = ''):
  """The recipe; arg may be `accelerator`."""
  c = smollm2_8_7x2_8.get_config(arg)
  c.exits.coefficients, c.exits.weight = 'aggressive', 0.3
  if not arg:
    c.steps = 24
  return c
