"""The toolkits: each package implements `cora_plugin.host.Host` for one of them."""
