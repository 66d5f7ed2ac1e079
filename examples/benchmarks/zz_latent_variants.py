import sys, functools
import jax, jax.numpy as jnp

sys.path.insert(0, "examples/benchmarks")
import zz_latent_kernel as k
from latent_attention import program, LATENT, ROTARY, CALLS
from record import medians_ms

B, S, H = 64, 4096, 128
q = jax.random.normal(jax.random.key(0), (CALLS, B, H, 576), jnp.bfloat16)
c = jax.random.normal(jax.random.key(1), (B, S, 576), jnp.bfloat16)
n = jnp.full(B, S, jnp.int32)
calls = {}
for name in "base regs168 regs160 noqk nopv noexp nomax norescale l2".split():
    k.VAR = name
    calls[name] = program(functools.partial(k.attend_by_plan, latent=512, scale=0.1, plan=k.LatentPlan()), (q, c, n))
for name in ("l2", "base"):
    k.VAR = name
    calls[name + " cluster"] = program(
        functools.partial(k.attend_by_plan, latent=512, scale=0.1, plan=k.LatentPlan(cluster=2)), (q, c, n)
    )
for name, ms in zip(calls, medians_ms(list(calls.values()), 5, inner=0.02)):
    print(f"{name:16} {1e3 * ms / CALLS:8.1f} us", flush=True)
