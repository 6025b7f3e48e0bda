"""A distribution that is installed as far as Python can tell: its metadata alone."""


def install(folder, monkeypatch, name, points):
    """Put a package's entry points of hosts on the path, until the test ends."""
    metadata = folder / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Name: {name}\nVersion: 1.0\n")
    lines = [f"{host} = {place}" for host, place in points.items()]
    text = "\n".join(["[cora_plugin.hosts]", *lines, ""])
    (metadata / "entry_points.txt").write_text(text)
    monkeypatch.syspath_prepend(folder)
