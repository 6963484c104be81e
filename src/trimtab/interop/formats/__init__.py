"""Formats of adapters, one file each: a subclass of `trimtab.interop.convert.Format`, found because it is here."""
