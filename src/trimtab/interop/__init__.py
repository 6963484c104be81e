"""trimtab beside other tools."""
