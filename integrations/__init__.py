"""The toolkits: each package fulfils `cora_plugin.layer.Host` for one of them."""
