"""What a run will take and cost, before it starts, and what limits it.

In: a recipe, a number of cases, machines; `prices.yaml` and `rates.yaml`.
Out: a plan in closed form, and the same by simulation. Runs in the command that asks; needs no Ray and no GPU.
"""
