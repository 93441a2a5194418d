//! Lines that begin with a slash.

use hydra_runtime::projection::Projection;
use std::path::PathBuf;

/// What `/help` says.
pub const HELP: &str = "\
/adapter [NAME]     use an adapter; \"none\" uses the model alone; without a name: list them
/system [TEXT]      set the system prompt; without a text: remove it
/router [L] [P]     colour tokens by their router's strongest head: the mean of all layers and projections, or
                    those of layer L and projection P (/router 3 up_proj); /router off
/reset              forget the conversation
/save FILE          write the conversation as JSON
/help               show this
/quit               end (so does Ctrl-D)
A line that ends with \\ goes on with the next one. Ctrl-C stops an answer.
";

/// Whose weights colour tokens; `None`: the mean over all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// A layer.
    pub layer: Option<usize>,
    /// A projection.
    pub projection: Option<Projection>,
}

/// One of them.
#[derive(Debug, PartialEq)]
pub enum Command {
    /// `None`: list them.
    Adapter(Option<String>),
    /// Empty: none.
    System(String),
    /// `None`: no colours.
    Router(Option<Place>),
    Reset,
    Save(PathBuf),
    Help,
    Quit,
}

impl Command {
    /// From a line that begins with a slash.
    pub fn parse(line: &str) -> Result<Self, String> {
        let (name, rest) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let rest = rest.trim();
        match (name, rest) {
            ("/adapter", "") => Ok(Self::Adapter(None)),
            ("/adapter", name) => Ok(Self::Adapter(Some(name.into()))),
            ("/system", text) => Ok(Self::System(text.into())),
            ("/router", "off") => Ok(Self::Router(None)),
            ("/router", place) => Ok(Self::Router(Some(parse_place(place)?))),
            ("/reset", "") => Ok(Self::Reset),
            ("/save", "") => Err("/save: expected a file's name".into()),
            ("/save", path) => Ok(Self::Save(path.into())),
            ("/help", "") => Ok(Self::Help),
            ("/quit" | "/exit", "") => Ok(Self::Quit),
            _ => Err(format!("{name}: no such command, or a word too many: /help lists them")),
        }
    }
}

fn parse_place(text: &str) -> Result<Place, String> {
    let mut place = Place::default();
    for word in text.split_whitespace() {
        match (word.parse(), Projection::parse(word)) {
            (Ok(layer), _) if place.layer.is_none() => place.layer = Some(layer),
            (_, Some(projection)) if place.projection.is_none() => place.projection = Some(projection),
            _ => {
                return Err(format!(
                    "/router: expected off, or a layer's number and a projection (up_proj), found {word:?}"
                ));
            }
        }
    }
    Ok(place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_become_commands() {
        let place = |layer, projection| Command::Router(Some(Place { layer, projection }));
        for (line, wanted) in [
            ("/adapter", Command::Adapter(None)),
            ("/adapter  run ", Command::Adapter(Some("run".into()))),
            ("/system Be brief. ", Command::System("Be brief.".into())),
            ("/system", Command::System(String::new())),
            ("/router", place(None, None)),
            ("/router 3", place(Some(3), None)),
            ("/router up_proj 3", place(Some(3), Some(Projection::Up))),
            ("/router off", Command::Router(None)),
            ("/save a b.json", Command::Save("a b.json".into())),
            ("/quit", Command::Quit),
        ] {
            assert_eq!(Command::parse(line).unwrap(), wanted, "{line}");
        }
        for wrong in ["/", "/adapters", "/reset now", "/save", "/router x", "/router 1 2"] {
            assert!(Command::parse(wrong).is_err(), "{wrong}");
        }
    }
}
