"""The stages of the asset pipeline; `offprompts_env.movielens.build` runs them."""
