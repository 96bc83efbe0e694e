"""Trees as pure logic: no engine, no training framework; numpy and torch on CPU only."""
