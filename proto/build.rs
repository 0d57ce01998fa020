//! Compiles `qpq/v1/*.proto` without `protoc`. Messages with a field marked `debug_redact` get a
//! `Debug` implementation without the field's value, so that no log line can contain a token.

use std::{env, error::Error, fmt::Write as _, fs, path::Path};

use protox::Compiler;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=qpq");
    let mut sources: Vec<_> =
        fs::read_dir("qpq/v1")?.map(|entry| entry.map(|e| e.path())).collect::<Result<_, _>>()?;
    sources.sort();

    let mut compiler = Compiler::new(["."])?;
    compiler.include_source_info(true).open_files(sources)?;

    let mut redacted = Vec::new();
    let mut debug_impls = String::new();
    for message in
        compiler.descriptor_pool().all_messages().filter(|m| m.package_name() == "qpq.v1")
    {
        let fields: Vec<_> = message
            .fields()
            .map(|field| {
                let secret = field
                    .options()
                    .get_field_by_name("debug_redact")
                    .is_some_and(|v| v.as_bool() == Some(true));
                (field.name().to_owned(), secret)
            })
            .collect();
        if fields.iter().any(|(_, secret)| *secret) {
            redacted.push(format!(".{}", message.full_name()));
            write_debug(&mut debug_impls, message.name(), &fields)?;
        }
    }

    let out = env::var_os("OUT_DIR").ok_or("OUT_DIR is set by cargo")?;
    fs::write(Path::new(&out).join("debug.rs"), debug_impls)?;
    prost_build::Config::new()
        .bytes(["."])
        .skip_debug(redacted)
        .compile_fds(compiler.file_descriptor_set())?;
    Ok(())
}

/// Writes `impl Debug` for a message. A redacted field shows only whether it is set.
fn write_debug(out: &mut String, message: &str, fields: &[(String, bool)]) -> std::fmt::Result {
    writeln!(out, "impl ::core::fmt::Debug for {message} {{")?;
    writeln!(out, "fn fmt(&self, f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {{")?;
    writeln!(out, "f.debug_struct({message:?})")?;
    for (name, secret) in fields {
        if *secret {
            writeln!(
                out,
                ".field({name:?}, &super::Redacted {{ is_set: !self.{name}.is_empty() }})"
            )?;
        } else {
            writeln!(out, ".field({name:?}, &self.{name})")?;
        }
    }
    writeln!(out, ".finish()\n}}\n}}")
}
