"""Built-in strategies, one file each; import them as `fedlora.strategies`."""

if __name__ != "fedlora.strategies":
    raise ImportError(
        "import fedlora.strategies, not strategies: under the bare name every class would exist twice"
    )
