"""Writers: traces as files of Perfetto and Chrome; internal."""
