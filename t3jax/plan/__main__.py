"""The command that plans; see `t3jax.commands.plan`."""

if __name__ == "__main__":
    from t3jax import commands

    commands.main("plan")
