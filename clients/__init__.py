"""Built-in clients, one file each; import them as `fedlora.clients`."""

if __name__ != "fedlora.clients":
    raise ImportError("import fedlora.clients, not clients: under the bare name every class would exist twice")
