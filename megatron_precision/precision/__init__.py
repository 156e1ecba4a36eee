"""The one room in which dtypes are decided, watched and audited."""
