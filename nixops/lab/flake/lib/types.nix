# Option types: `check` says whether one definition fits, `merge path defs` makes one value of all of them.
{ lib }:

let
  inherit (lib) mergeDefinitions showDefs showOption;
  inherit (builtins)
    all
    attrNames
    concatMap
    elem
    filter
    head
    isAttrs
    isBool
    isFloat
    isFunction
    isInt
    isList
    isPath
    isString
    length
    map
    tail
    toString
    ;

  mkType =
    {
      name,
      check,
      merge ? mergeEqual,
      description ? name,
      ...
    }@args:
    {
      _type = "option-type";
      inherit name check merge description;
    }
    // (if args ? emptyValue then { inherit (args) emptyValue; } else { });

  mergeEqual =
    path: defs:
    if length defs == 1 || all (d: d.value == (head defs).value) (tail defs) then
      (head defs).value
    else
      throw "The option `${showOption path}' has conflicting definition values:${showDefs defs}\nUse `lib.mkForce value' or `lib.mkDefault value' to change the priority on any of these definitions.";

  mergeOne =
    path: defs:
    if length defs == 1 then
      (head defs).value
    else
      throw "The option `${showOption path}' is defined multiple times while it's expected to be unique.\nDefinition values:${showDefs defs}\nUse `lib.mkForce value' or `lib.mkDefault value' to change the priority on any of these definitions.";

  isStringLike = v: isString v || isPath v || (isAttrs v && (v ? outPath || v ? __toString));

  t = rec {
    inherit mkType;

    raw = mkType {
      name = "raw";
      description = "raw value";
      check = _: true;
      merge = mergeOne;
    };
    unspecified = anything // {
      description = "unspecified value";
    };
    bool = mkType {
      name = "bool";
      description = "boolean";
      check = isBool;
    };
    int = mkType {
      name = "int";
      description = "signed integer";
      check = isInt;
    };
    ints = {
      positive = int // {
        description = "positive integer, meaning >0";
        check = v: isInt v && v > 0;
      };
      unsigned = int // {
        description = "unsigned integer, meaning >=0";
        check = v: isInt v && v >= 0;
      };
      between =
        low: high:
        int
        // {
          description = "integer between ${toString low} and ${toString high} (both inclusive)";
          check = v: isInt v && v >= low && v <= high;
        };
    };
    port = ints.between 0 65535;
    float = mkType {
      name = "float";
      description = "floating point number";
      check = isFloat;
    };
    number = either int float;
    str = mkType {
      name = "str";
      description = "string";
      check = isString;
    };
    nonEmptyStr = str // {
      description = "non-empty string";
      check = v: isString v && v != "";
    };
    strMatching =
      pattern:
      str
      // {
        description = "string matching the pattern ${pattern}";
        check = v: isString v && builtins.match pattern v != null;
      };
    separatedString =
      sep:
      mkType {
        name = "separatedString";
        description = if sep == "" then "Concatenated string" else "strings concatenated with ${builtins.toJSON sep}";
        check = isString;
        merge = _: defs: lib.concatMapStringsSep sep (d: d.value) defs;
      };
    lines = separatedString "\n";
    commas = separatedString ",";
    path = mkType {
      name = "path";
      description = "absolute path";
      check = v: isStringLike v && builtins.substring 0 1 (toString v) == "/";
    };
    package = mkType {
      name = "package";
      check = v: lib.isDerivation v || (isStringLike v && lib.hasPrefix builtins.storeDir (toString v));
    };
    enum =
      values:
      mkType {
        name = "enum";
        description = "one of ${lib.concatMapStringsSep ", " builtins.toJSON values}";
        check = v: elem v values;
      };
    functionTo =
      result:
      mkType {
        name = "functionTo";
        description = "function that evaluates to a(n) ${result.description}";
        check = isFunction;
        merge = mergeOne;
      };

    # Whatever it is: sets are merged deeply, lists only when there is one.
    anything = mkType {
      name = "anything";
      check = _: true;
      merge =
        path: defs:
        if length defs > 1 && all (d: isAttrs d.value && !lib.isDerivation d.value) defs then
          (lazyAttrsOf anything).merge path defs
        else
          mergeEqual path defs;
    };

    nullOr =
      type:
      mkType {
        name = "nullOr";
        description = "null or ${type.description}";
        check = v: v == null || type.check v;
        merge =
          path: defs:
          let
            nulls = length (filter (d: d.value == null) defs);
          in
          if nulls == length defs then
            null
          else if nulls != 0 then
            throw "The option `${showOption path}' is defined both null and not null, in:${showDefs defs}"
          else
            type.merge path defs;
      };
    either =
      a: b:
      mkType {
        name = "either";
        description = "${a.description} or ${b.description}";
        check = v: a.check v || b.check v;
        merge =
          path: defs:
          if all (d: a.check d.value) defs then
            a.merge path defs
          else if all (d: b.check d.value) defs then
            b.merge path defs
          else
            mergeEqual path defs;
      };
    oneOf = types: builtins.foldl' either (head types) (tail types);
    coercedTo =
      from: coerce: to:
      mkType {
        name = "coercedTo";
        description = "${to.description} or ${from.description} convertible to it";
        check = v: (from.check v && to.check (coerce v)) || to.check v;
        merge = path: defs: to.merge path (map (d: if from.check d.value then d // { value = coerce d.value; } else d) defs);
      };

    listOf =
      element:
      mkType {
        name = "listOf";
        description = "list of ${element.description}";
        check = isList;
        emptyValue = [ ];
        merge =
          path: defs:
          map (m: m.mergedValue) (
            filter (m: m.isDefined) (
              concatMap (
                d:
                lib.imap1 (
                  n: value:
                  mergeDefinitions (path ++ [ "[definition ${toString n}]" ]) element [ { inherit (d) file; inherit value; } ]
                ) d.value
              ) defs
            )
          );
      };

    attrsOfWith =
      lazy: element:
      mkType {
        name = if lazy then "lazyAttrsOf" else "attrsOf";
        description = "attribute set of ${element.description}";
        check = v: isAttrs v && !(v ? _type && v._type == "option");
        emptyValue = { };
        merge =
          path: defs:
          let
            names = lib.unique (concatMap (d: attrNames d.value) defs);
            each =
              name:
              mergeDefinitions (path ++ [ name ]) element (
                map (d: {
                  inherit (d) file;
                  value = d.value.${name};
                }) (filter (d: d.value ? ${name}) defs)
              );
            merged = lib.genAttrs names each;
          in
          builtins.mapAttrs (_: m: m.mergedValue) (if lazy then merged else lib.filterAttrs (_: m: m.isDefined) merged);
      };
    attrsOf = attrsOfWith false;
    lazyAttrsOf = attrsOfWith true;
    attrs = mkType {
      name = "attrs";
      description = "attribute set";
      check = isAttrs;
      emptyValue = { };
      merge = _: defs: lib.mergeAttrsList (map (d: d.value) defs);
    };

    # A set with options of its own; `name` is its attribute's name.
    submodule = module: submoduleWith { modules = lib.toList module; };
    submoduleWith =
      {
        modules,
        specialArgs ? { },
      }:
      let
        evaluate =
          path: defs:
          (lib.evalModules {
            modules =
              modules
              ++ map (
                d:
                if isAttrs d.value then
                  {
                    _file = d.file;
                    config = d.value;
                  }
                else
                  {
                    _file = d.file;
                    imports = [ d.value ];
                  }
              ) defs;
            specialArgs = specialArgs // {
              name = lib.last path;
            };
            prefix = path;
          }).config;
      in
      mkType {
        name = "submodule";
        check = v: isAttrs v || isFunction v || isPath v;
        merge = evaluate;
      };

    optionType = mkType {
      name = "optionType";
      check = v: isAttrs v && v._type or null == "option-type";
    };
  };
in
t
